"""Who may call what: bearer tokens, and the scopes that they carry.

A call is judged twice. Before its request is read, by its token: who has none, or a
wrong one, costs the server nothing but the answer. And once the request is decoded,
by its scopes, before it is looked at for anything else:

- `admin` may do everything.
- `tenant:<id>` may do what producers do, with the jobs of that tenant.
- `worker:<task group>` may lease the tasks of that task group and report on them,
  whichever tenant's they are.

Scopes add up, each by itself. A method that no other scope names needs `admin`, so
that a new method starts closed. Tokens are not kept, only their digests.
"""

import hashlib
import hmac
from collections.abc import Iterable
from typing import Any  # Requests of different methods have different fields.

import msgspec

from silo.config import Config, split_scope
from silo.errors import ErrorKind, SiloError
from silo.model.job import DEFAULT_TENANT

HEADER = "authorization"
_SCHEME = "Bearer "

FOR_EVERYONE = frozenset({"GetClusterInfo"})  # Who does not know the shard map cannot call anything else.
FOR_TENANTS = frozenset(
    {
        "Enqueue",
        "GetJob",
        "GetJobResult",
        "DeleteJob",
        "CancelJob",
        "RestartJob",
        "ExpediteJob",
        "WatchJob",
    }
)
FOR_TENANTS_EACH = frozenset({"EnqueueMany"})  # By the tenant of each part.
FOR_TASK_GROUPS = frozenset({"LeaseTasks"})
FOR_LEASES = frozenset({"ReportOutcome", "ReportRefreshOutcome", "Heartbeat"})  # By the lease's task group.


class Unauthenticated(SiloError):
    """Nobody we know. The text is part of the protocol."""

    kind = ErrorKind.UNAUTHENTICATED


class Denied(SiloError):
    """The token is right, and its scopes do not reach this far. The text names the scope that would."""

    kind = ErrorKind.DENIED


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may do."""

    is_admin: bool = False
    tenants: frozenset[str] = frozenset()
    task_groups: frozenset[str] = frozenset()

    def check_call(self, method: str, request: Any) -> None:
        """Whether this request may go on.

        Of `FOR_LEASES` it says only that some worker may send them: `check_task` has the
        last word, once the lease is known.

        Raises:
            Denied: it may not.
        """
        if self.is_admin or method in FOR_EVERYONE:
            return
        if method in FOR_TENANTS:
            tenant = request.tenant or DEFAULT_TENANT
            if tenant not in self.tenants:
                raise Denied(f"{method} needs a token with scope 'tenant:{tenant}'")
        elif method in FOR_TENANTS_EACH:
            if not self.tenants:
                raise Denied(f"{method} needs a token with a scope 'tenant:<id>'")
        elif method in FOR_TASK_GROUPS:
            if request.task_group not in self.task_groups:
                raise Denied(f"{method} needs a token with scope 'worker:{request.task_group}'")
        elif method in FOR_LEASES:
            if not self.task_groups:
                raise Denied(f"{method} needs a token with a scope 'worker:<task group>'")
        else:
            raise Denied(f"{method} needs a token with scope 'admin'")

    def check_task(self, task_group: str) -> None:
        """Whether a task of this group may be reported on.

        Raises:
            Denied: it may not.
        """
        if not self.is_admin and task_group not in self.task_groups:
            raise Denied(f"this task needs a token with scope 'worker:{task_group}'")


EVERYTHING = Access(is_admin=True)


class Tokens:
    """The tokens that a server knows."""

    def __init__(self, tokens: Iterable[tuple[str, Access]]) -> None:
        self._known = [(_digest(_SCHEME + token), access) for token, access in tokens]

    def __repr__(self) -> str:
        return f"Tokens({len(self._known)})"

    @property
    def accesses(self) -> frozenset[Access]:
        """What `access` can answer."""
        return frozenset(access for _, access in self._known)

    def access(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> Access:
        """What the caller who sent this metadata may do.

        Takes the same time whichever token it is, and however much of it is right.

        Raises:
            Unauthenticated: no token, or not one of ours.
        """
        sent = next((value for key, value in metadata or () if key == HEADER), None)
        if sent is None:
            raise Unauthenticated("missing authorization header")
        if isinstance(sent, bytes) or not (sent.isascii() and sent.isprintable()):
            raise Unauthenticated("invalid authorization header")
        digest = _digest(sent)
        found: Access | None = None
        for known, access in self._known:
            if hmac.compare_digest(known, digest):
                found = access
        if found is None:
            raise Unauthenticated("invalid auth token")
        return found


def tokens_from(config: Config) -> Tokens | None:
    """The tokens of the configuration; None when it has none, and everyone may do everything."""
    known: list[tuple[str, Access]] = []
    if config.server.auth_token is not None:
        known.append((config.server.auth_token.reveal(), EVERYTHING))
    for entry in config.auth.tokens or ():
        known.append((entry.token.reveal(), access_from(entry.scopes)))
    return Tokens(known) if known else None


def access_from(scopes: Iterable[str]) -> Access:
    """What these scopes allow together.

    Raises:
        ValueError: one of them is no scope.
    """
    parts = [split_scope(scope) for scope in scopes]
    return Access(
        is_admin=any(kind == "admin" for kind, _ in parts),
        tenants=frozenset(name for kind, name in parts if kind == "tenant"),
        task_groups=frozenset(name for kind, name in parts if kind == "worker"),
    )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
