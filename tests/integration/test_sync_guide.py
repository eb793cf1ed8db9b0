"""Every example of the guide to Django and Flask runs as it is printed."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from silo.testing import SyncServer, sync_server

_GUIDE = Path(__file__).parents[2] / "docs/guides/django-and-flask.md"
_EXAMPLES = re.findall(r"```python\n(.*?)```", _GUIDE.read_text(), re.S)
_PLAIN, _FLASK, _DJANGO_VIEW, _DJANGO_COMMAND = _EXAMPLES
_ADDRESS = "localhost:7450"

_CALL_FLASK = """

client = app.test_client()
ordered = client.post("/reports", json={"month": "2024-05"})
assert ordered.status_code == 202, ordered
found = client.get(f"/reports/{ordered.json['id']}")
assert found.json == {"status": "Scheduled", "result": None}, found.json
assert client.get("/reports/nobody").status_code == 404
"""
_SETTINGS = """
import sys
import django
from django.conf import settings

settings.configure(
    SILO_SERVERS=[sys.argv[1]],
    ALLOWED_HOSTS=["*"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    INSTALLED_APPS=["shop"],
    ROOT_URLCONF="urls",
    USE_TZ=True,
)
django.setup()
"""
_CALL_DJANGO = """
from django.test import Client

for _ in range(2):
    answer = Client().post("/confirm/17")
    assert answer.json() == {"confirmed": 17}, answer

from shop.views import silo
print(silo.get_job("confirm-17").payload, flush=True)

from django.core.management import call_command
call_command("run_worker")
print(silo.get_job("confirm-17").result, flush=True)
"""
_URLS = """
from django.urls import path
from shop.views import confirm

urlpatterns = [path("confirm/<int:order_id>", confirm)]
"""


@pytest.fixture
def server() -> Iterator[SyncServer]:
    with sync_server() as running:
        yield running


def run(folder: Path, script: str, *arguments: str) -> str:
    (folder / "example.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "-W", "error", "example.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_plain_example_runs(server: SyncServer, tmp_path: Path) -> None:
    assert run(tmp_path, _PLAIN.replace(_ADDRESS, server.address)) == "Scheduled\nCancelled\n"


def test_the_flask_example_runs(server: SyncServer, tmp_path: Path) -> None:
    run(tmp_path, _FLASK.replace(_ADDRESS, server.address) + _CALL_FLASK)


def test_the_django_examples_run(server: SyncServer, tmp_path: Path) -> None:
    pytest.importorskip("django")
    commands = tmp_path / "shop/management/commands"
    commands.mkdir(parents=True)
    for folder in (commands, commands.parent, tmp_path / "shop"):
        (folder / "__init__.py").touch()
    (tmp_path / "shop/views.py").write_text(_DJANGO_VIEW)
    (commands / "run_worker.py").write_text(_DJANGO_COMMAND)
    (tmp_path / "urls.py").write_text(_URLS)
    (tmp_path / "example.py").write_text(_SETTINGS + _CALL_DJANGO)
    with subprocess.Popen(
        [sys.executable, "-W", "error", "example.py", server.address],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "{'order': 17}\n"
            server.wait_for(server.client.handle("confirm-17"), "Succeeded")
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "{'confirmed': 17}\n"
            assert process.wait(20) == 0
        finally:
            process.kill()
