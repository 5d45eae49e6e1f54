#!/bin/bash
# systemd_box.sh up FOLDER [SHOWN...] | in FOLDER COMMAND... | down FOLDER
#
# A real systemd as PID 1 in namespaces of its own, over an overlay of /: what it writes is gone with it. FOLDER is where
# the box keeps its own things; the SHOWN folders of the host are seen inside at the same path. Needs root, systemd,
# unshare and nsenter (util-linux), and a cgroup v2 mount that can be written.
set -u
verb=$1 box=$2
shift 2
cgroup2=$(awk '$3 == "cgroup2" { print $2; exit }' /proc/mounts)
cgroup=$cgroup2/box-$(basename "$box")

init() { cat "/proc/$(cat "$box/pid")/task/$(cat "$box/pid")/children" | cut -d' ' -f1; }

inside() {
  exec timeout "${T:-30}" nsenter -t "$(init)" -m -u -i -n -p -C -r -w \
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin SYSTEMD_PAGER= SYSTEMD_COLORS=0 "$@"
}

masked="systemd-udevd.service systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udev-trigger.service
  systemd-modules-load.service systemd-sysctl.service systemd-resolved.service systemd-timesyncd.service
  systemd-networkd.service console-getty.service systemd-firstboot.service systemd-random-seed.service
  systemd-remount-fs.service systemd-binfmt.service"

build() { # the new root, then systemd
  set -e
  parts=$box/parts root=$box/parts/root
  mount -t tmpfs -o size=512m,mode=755 tmpfs "$parts"
  mkdir "$parts/upper" "$parts/work" "$parts/proc" "$root"
  mount -t overlay overlay -o "lowerdir=/,upperdir=$parts/upper,workdir=$parts/work" "$root"
  mount -t proc proc "$root/proc"
  mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
  mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"
  mount -t tmpfs -o mode=755,size=64m tmpfs "$root/run"
  mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/tmp"
  mount -t tmpfs -o mode=755,size=4m tmpfs "$root/dev"
  for name in null zero full random urandom tty; do
    : >"$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
  done
  mkdir "$root/dev/pts" "$root/dev/shm"
  mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts "$root/dev/pts"
  mount -t tmpfs -o mode=1777,size=16m tmpfs "$root/dev/shm"
  ln -s pts/ptmx "$root/dev/ptmx"
  ln -s /proc/self/fd "$root/dev/fd"
  mkdir -p "$root/run/systemd/system" "$root/run/old"
  for unit in $masked; do ln -sf /dev/null "$root/run/systemd/system/$unit"; done
  for shown in "$@"; do
    mkdir -p "$root$shown"
    mount --rbind "$shown" "$root$shown"
  done
  cd "$root"
  pivot_root . run/old
  umount -l /run/old
  mount --make-rshared /
  ip link set lo up 2>/dev/null || true
  exec env -i container=box PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /usr/lib/systemd/systemd --unit=basic.target --show-status=false
}

case $verb in
up)
  mkdir -p "$box/parts" "$cgroup"
  (
    exec >"$box/log" 2>&1 </dev/null
    echo $BASHPID >"$cgroup/cgroup.procs"
    exec setsid unshare --cgroup --mount --uts --ipc --net --pid --fork --kill-child=KILL --propagation private \
      bash "$0" build "$box" "$@"
  ) &
  echo $! >"$box/pid"
  for _ in $(seq 150); do
    sleep 0.1
    state=$(T=5 "$0" in "$box" systemctl is-system-running 2>/dev/null)
    case $state in running | degraded) break ;; esac
  done
  echo "$state"
  ;;
in) inside "$@" ;;
down)
  T=5 "$0" in "$box" systemctl poweroff 2>/dev/null
  for _ in $(seq 50); do
    kill -0 "$(cat "$box/pid")" 2>/dev/null || break
    sleep 0.1
  done
  kill -9 "$(cat "$box/pid")" 2>/dev/null
  for _ in $(seq 50); do
    find "$cgroup" -depth -type d -exec rmdir {} \; 2>/dev/null
    [ -d "$cgroup" ] || break
    sleep 0.1
  done
  ;;
build) build "$@" ;;
esac
