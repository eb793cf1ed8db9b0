"""Silo for code that waits: the client without `await`, for Django, Flask, scripts and shells.

from silo.sync import SiloClient

silo = SiloClient(servers=["localhost:7450"])
job = silo.enqueue(payload={"to": "ada@example.com"}, task_group="emails")
print(job.result(timeout=30).status)
"""

from silo.sync.client import SiloClient
from silo.sync.handle import JobHandle

__all__ = ["JobHandle", "SiloClient"]
