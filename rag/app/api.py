"""The HTTP API: ``/ask``, ``/edit``, ``/undo``, ``/ingest``, ``/health``, with its description at ``/docs`` and ``/openapi.json``."""

from __future__ import annotations

import ipaddress
import secrets
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field

from lab.errors import BusyError, ConfigError, KnowLabError, RequestError
from rag.app.limits import BodyLimit
from rag.app.service import MAX_DOCUMENT, Service
from rag.asking import MAX_QUESTION

# A character takes up to four bytes, or six when JSON escapes it.
MAX_BODY = 6 * MAX_DOCUMENT + 10_000

_Name = Annotated[str, Field(min_length=1, max_length=200)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Ask(_Body):
    """A question."""

    question: Annotated[str, Field(min_length=1, max_length=MAX_QUESTION)]
    mode: Literal["memory", "documents"] = "documents"
    policy: Literal["context", "memory", "trust", "ledger"] = "context"
    attention: bool = False


class Edit(_Body):
    """A fact and its new object; ``object`` and ``prompt`` for facts that the built-in world does not know."""

    subject: _Name
    relation: _Name
    new: _Name
    object: Annotated[str, Field(max_length=200)] = ""
    prompt: Annotated[str, Field(max_length=500)] = ""
    on_conflict: Literal["edit_wins", "annotate", "rewrite", "doc_wins", "ask"] = "edit_wins"


class Undo(_Body):
    """Which entry to take off; the last one without a number."""

    entry: Annotated[int, Field(ge=1)] | None = None


class Ingest(_Body):
    """A document."""

    name: _Name
    text: Annotated[str, Field(min_length=1, max_length=MAX_DOCUMENT)]
    trust: Literal["verified", "unverified", "superseded"] | None = None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Key:
    """The token that writing needs.

    Args:
        token: The token; ``None`` lets everybody write.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token

    @property
    def needed(self) -> bool:
        """Whether there is a token."""
        return self._token is not None

    def fits(self, given: str) -> bool:
        """Whether somebody who gives this may write."""
        return self._token is None or secrets.compare_digest(given.encode(), self._token.encode())


class _Denied(Exception):
    pass


def create_app(
    service: Service, *, host: str = "127.0.0.1", token: str | None = None, page: bool = True
) -> FastAPI:
    """The application.

    Args:
        service: What it serves.
        host: Where it will listen.
        token: What writing verbs must send as ``Authorization: Bearer TOKEN``; needed where others can reach the host.
        page: Mounts the page at ``/page``.

    Raises:
        ConfigError: Others can reach the host, and there is no token; or the token is shorter than 16 characters.
    """
    if not is_loopback(host) and not token:
        raise ConfigError(
            f"others can reach {host!r}: give a token for the verbs that write, or listen on 127.0.0.1"
        )
    if token is not None and len(token) < 16:
        raise ConfigError("a token needs 16 characters or more")
    key = Key(token)
    app = FastAPI(
        title="KnowLab", description="Ask a model with and without documents, change what it knows, undo."
    )
    app.add_middleware(BodyLimit, limit=MAX_BODY)
    if is_loopback(host):
        # A page elsewhere that resolves its own name to this machine does not get in.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", "::1"])
    _add_errors(app)

    def writer(authorization: Annotated[str, Header()] = "") -> None:
        scheme, _, given = authorization.partition(" ")
        if not key.fits(given.strip() if scheme.lower() == "bearer" else ""):
            raise _Denied

    writes = [Depends(writer)]

    @app.get("/health")
    def health() -> dict[str, Any]:
        """What runs here."""
        return service.health()

    @app.post("/ask")
    def ask(body: Ask) -> dict[str, Any]:
        """Answers a question; says what memory, each document and the ledger say, and who wins."""
        return service.ask(body.question, mode=body.mode, policy=body.policy, attention=body.attention)

    @app.post("/edit", dependencies=writes)
    def edit(body: Edit) -> dict[str, Any]:
        """Changes a fact in weights, ledger and documents."""
        return service.edit(
            body.subject,
            body.relation,
            body.new,
            object=body.object,
            prompt=body.prompt,
            on_conflict=body.on_conflict,
        )

    @app.post("/undo", dependencies=writes)
    def undo(body: Undo) -> dict[str, Any]:
        """Takes an entry off."""
        return service.undo(body.entry)

    @app.post("/ingest", dependencies=writes)
    def ingest(body: Ingest) -> dict[str, Any]:
        """Takes a document in."""
        return service.ingest(body.name, body.text, trust=body.trust)

    if not page:
        return app
    from rag.app.page import mount

    @app.get("/", include_in_schema=False)
    def root() -> RedirectResponse:
        return RedirectResponse("/page")

    return mount(app, service, key)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # The default answer repeats the input, however long it is.
        said = [f"{'.'.join(str(part) for part in one['loc'][1:])}: {one['msg']}" for one in error.errors()]
        return JSONResponse({"error": "; ".join(said)}, 422)

    @app.exception_handler(_Denied)
    def denied(_: Request, __: _Denied) -> JSONResponse:
        message = "this verb needs the token: send Authorization: Bearer TOKEN"
        return JSONResponse({"error": message}, 401, {"WWW-Authenticate": "Bearer"})

    @app.exception_handler(KnowLabError)
    def refused(_: Request, error: KnowLabError) -> JSONResponse:
        code = (
            409
            if isinstance(error, BusyError)
            else 422
            if isinstance(error, (RequestError, ConfigError))
            else 500
        )
        return JSONResponse({"error": " ".join(str(error).split())}, code)
