"""Authentication and authorization: tokens from a file, and TLS."""

from __future__ import annotations

import hashlib
import hmac
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from shorttail.define.inputs import check_regular, read_input
from shorttail.errors import InvalidArgument, Unauthenticated
from shorttail.server.settings import ServerSettings

# The access of a connection. native/wire_limits.pxi uses the same numbers.
NONE: Final = 0
SERVE: Final = 1  # all methods that read
ADMIN: Final = 2  # push, delete and commands as well

LEVELS: Final = {"serve": SERVE, "admin": ADMIN}
TOKEN_LENGTH_MIN: Final = 16
FILE_BYTES: Final = 65_536


class Token(NamedTuple):
    """The access that a token gives, and its label, "" for none."""

    level: int
    label: str = ""


class Tokens:
    """The tokens of a file, one per line: `serve TOKEN` or `admin TOKEN`. `#` begins a comment.

    A third word is the label of the token, which the history of a store shows. Several tokens of a kind are valid at
    the same time, so that a token can be replaced without a gap.
    """

    def __init__(self, tokens: Mapping[str, Token]):
        # Digests have one length, so that a comparison tells nothing about the length of a token.
        self._tokens = [(_digest(text), token) for text, token in tokens.items()]

    @classmethod
    def read(cls, path: str) -> Self:
        """Read a token file. Raises InvalidArgument if it is unreadable, readable by others, or has a wrong line."""
        return cls(read_tokens(path))

    def access(self, token: str) -> int:
        """The access that a token gives; NONE for an unknown token. Takes the same time whichever token matches."""
        return self.find(token).level

    def find(self, token: str) -> Token:
        """The token of that text; an unknown one has the level NONE. Takes the same time whichever token matches."""
        given = _digest(token)
        found = Token(NONE)
        for digest, known in self._tokens:
            found = max(found, Token(known.level * hmac.compare_digest(given, digest), known.label))
        return found

    def authenticate(self, params: list[Any]) -> int:
        """Answer the method `auth`: the access of its token. Raises InvalidArgument, Unauthenticated."""
        access = self.access(auth_token(params))
        if access == NONE:
            raise Unauthenticated("this token is not known here")
        return access


def auth_token(params: list[Any]) -> str:
    if len(params) != 1 or not isinstance(params[0], str):
        raise InvalidArgument("auth takes [token]")
    return params[0]


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def read_tokens(path: str) -> dict[str, Token]:
    """Read a token file. Raises InvalidArgument."""
    try:
        check_regular(path)  # every worker reads it
        with Path(path).open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(FILE_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it is not UTF-8"
        raise InvalidArgument(f"token file {path}: {reason}") from None
    # The group may read, because secrets are mounted into containers that way.
    if mode & 0o027:
        raise InvalidArgument(f"token file {path} can be read by others or written by the group: chmod 600 {path}")
    tokens: dict[str, Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) not in (2, 3) or words[0] not in LEVELS:
            raise InvalidArgument(
                f"token file {path}, line {number}: write `serve TOKEN` or `admin TOKEN`; a label may follow"
            )
        if len(words[1]) < TOKEN_LENGTH_MIN:
            raise InvalidArgument(
                f"token file {path}, line {number}: a token of fewer than {TOKEN_LENGTH_MIN} characters is guessed "
                f"too easily; make one with `openssl rand -hex 32`"
            )
        token = Token(LEVELS[words[0]], *words[2:])
        tokens[words[1]] = max(token, tokens.get(words[1], token))
    if not tokens:
        raise InvalidArgument(f"token file {path} has no token; write `serve TOKEN` or `admin TOKEN` in it")
    return tokens


def client_token(path: str) -> str:
    """The token for a client: a file's only word, or the token of a server's token file that allows most."""
    try:
        words = read_input(path).decode().split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"token file {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    if len(words) == 1:
        return words[0]
    tokens = read_tokens(path)
    return max(tokens, key=lambda text: tokens[text].level)


# -- TLS -------------------------------------------------------------------------------------------------------------


def server_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """The TLS context of a server: TLS 1.2 or newer. With a client CA, only clients with one of its certificates.

    None if the settings name no certificate. Raises InvalidArgument for files that cannot be used.
    """
    if settings.tls_cert is None:
        for option, value in (("--tls-key", settings.tls_key), ("--tls-client-ca", settings.tls_client_ca)):
            if value is not None:
                raise InvalidArgument(f"{option} needs --tls-cert, the server's own certificate")
        return None
    files = {"--tls-cert": settings.tls_cert, "--tls-key": settings.tls_key, "--tls-client-ca": settings.tls_client_ca}
    for option, path in files.items():
        if path is not None and Path(path).exists():
            try:
                check_regular(path)  # every worker reads it
            except OSError as error:
                raise InvalidArgument(f"{option} {path}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    key = settings.tls_key or settings.tls_cert
    try:
        # Without the callback, OpenSSL would ask for the password of an encrypted key on the terminal.
        context.load_cert_chain(settings.tls_cert, key, password=lambda: b"")
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"--tls-cert {settings.tls_cert}, --tls-key {key}: {_reason(error)}") from None
    if settings.tls_client_ca is not None:
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except OSError as error:
            raise InvalidArgument(f"--tls-client-ca {settings.tls_client_ca}: {_reason(error)}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"{(error.reason or 'not understood').lower().replace('_', ' ')}; give PEM files that belong together"
    return str(getattr(error, "strerror", None) or error).lower()


def check(settings: ServerSettings) -> None:
    """Check that a worker can start with the token and TLS files. Raises InvalidArgument."""
    server_context(settings)
    if settings.token_file is not None:
        Tokens.read(settings.token_file)
