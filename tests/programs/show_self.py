"""Prints what it was given, as one JSON object on one line, then waits: pid, argv, cwd, ids, umask, environment, open
descriptors with their targets, session, limits, scheduling, signal dispositions."""

import json
import os
import resource
import signal
import sys

mask = os.umask(0)
os.umask(mask)
with open("/proc/self/status") as file:
    status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
with open("/proc/self/oom_score_adj") as file:
    oom_score_adj = int(file.read())
descriptors = {}
for name in os.listdir("/proc/self/fd"):
    try:
        descriptors[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:  # the one that listed the folder
        continue
shown = {
    "pid": os.getpid(),
    "ppid": os.getppid(),
    "pgid": os.getpgid(0),
    "sid": os.getsid(0),
    "argv": sys.argv[1:],
    "cwd": os.getcwd(),
    "uid": os.getresuid(),
    "gid": os.getresgid(),
    "groups": os.getgroups(),
    "umask": mask,
    "environment": dict(os.environ),
    "descriptors": descriptors,
    "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "processes": resource.getrlimit(resource.RLIMIT_NPROC),
    "core": resource.getrlimit(resource.RLIMIT_CORE),
    "nice": os.getpriority(os.PRIO_PROCESS, 0),
    "oom_score_adj": oom_score_adj,
    "cpu_affinity": sorted(os.sched_getaffinity(0)),
    "no_new_privileges": status["NoNewPrivs"].strip() == "1",
    "blocked_signals": int(status["SigBlk"], 16),
    "ignored_signals": int(status["SigIgn"], 16),
}
print(json.dumps(shown), flush=True)
while True:
    signal.pause()
