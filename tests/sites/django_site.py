"""Makes a real Django project, by Django's own `startproject`, with a view that reads its SQLite database."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

APP = "djsite.wsgi:application"

_SETTINGS = """
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
"""

_URLS = """
from django.contrib.sessions.models import Session
from django.http import HttpRequest, HttpResponse
from django.urls import path


def index(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"django {Session.objects.count()} sessions\\n")


urlpatterns = [path("", index)]
"""


def django_site(folder: Path) -> Path:
    """Makes the project `djsite` in `folder`, which must exist, and returns the folder to run `APP` in."""
    _run(folder, "-m", "django", "startproject", "djsite", str(folder))
    with (folder / "djsite" / "settings.py").open("a") as settings:
        settings.write(_SETTINGS)
    (folder / "djsite" / "urls.py").write_text(_URLS)
    _run(folder, "manage.py", "migrate", "--verbosity=0", "sessions")
    return folder


def _run(folder: Path, *argv: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"}
    subprocess.run([sys.executable, *argv], cwd=folder, env=environment, check=True, timeout=60)
