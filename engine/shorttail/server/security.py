"""Who may do what: tokens from a file, and TLS."""

from __future__ import annotations

import hashlib
import hmac
import os
import ssl
from pathlib import Path
from typing import Any, Final, Self

from shorttail.errors import InvalidArgument, Unauthenticated
from shorttail.server.settings import ServerSettings

# What a connection may do. native/wire_limits.pxi knows the same numbers.
NONE: Final = 0
SERVE: Final = 1  # everything that reads
ADMIN: Final = 2  # push and delete too

LEVELS: Final = {"serve": SERVE, "admin": ADMIN}
TOKEN_LENGTH_MIN: Final = 16
FILE_BYTES: Final = 65_536


class Tokens:
    """The tokens of a file: a line each, `serve TOKEN` or `admin TOKEN`; `#` begins a comment.

    Several of a kind are all valid, so that one can be replaced by another without a gap.
    """

    def __init__(self, levels: dict[str, int]):
        # Digests are of one length, so that comparing them tells nothing about that of a token.
        self._levels = [(_digest(token), level) for token, level in levels.items()]

    @classmethod
    def read(cls, path: str) -> Self:
        """Raises InvalidArgument for a file that cannot be read, that others may read, or that is not understood."""
        return cls(read_tokens(path))

    def access(self, token: str) -> int:
        """What a token allows; NONE for one that is not known. Takes the same time whichever matches."""
        given = _digest(token)
        found = NONE
        for digest, level in self._levels:
            found = max(found, level * hmac.compare_digest(given, digest))
        return found

    def authenticate(self, params: list[Any]) -> int:
        """The method `auth`. Raises InvalidArgument, Unauthenticated."""
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


def read_tokens(path: str) -> dict[str, int]:
    """token -> access, as a token file says."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(FILE_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it is not UTF-8"
        raise InvalidArgument(f"token file {path}: {reason}") from None
    # The group may read: that is how a container's secrets are mounted.
    if mode & 0o027:
        raise InvalidArgument(f"token file {path} can be read by others or written by the group: chmod 600 {path}")
    levels: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or words[0] not in LEVELS:
            raise InvalidArgument(f"token file {path}, line {number}: write `serve TOKEN` or `admin TOKEN`")
        if len(words[1]) < TOKEN_LENGTH_MIN:
            raise InvalidArgument(
                f"token file {path}, line {number}: a token of fewer than {TOKEN_LENGTH_MIN} characters is guessed "
                f"too easily; make one with `openssl rand -hex 32`"
            )
        levels[words[1]] = max(LEVELS[words[0]], levels.get(words[1], NONE))
    if not levels:
        raise InvalidArgument(f"token file {path} has no token; write `serve TOKEN` or `admin TOKEN` in it")
    return levels


def client_token(path: str) -> str:
    """The token for a client from a file: of a server's token file the one that allows most, else its one word."""
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"token file {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    if len(words) == 1:
        return words[0]
    tokens = read_tokens(path)
    return max(tokens, key=lambda token: tokens[token])


# -- TLS -------------------------------------------------------------------------------------------------------------


def server_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with the certificate given; with a client CA, only clients that show one of its certificates.

    None without a certificate. Raises InvalidArgument for files that do not serve.
    """
    if settings.tls_cert is None:
        for option, value in (("--tls-key", settings.tls_key), ("--tls-client-ca", settings.tls_client_ca)):
            if value is not None:
                raise InvalidArgument(f"{option} needs --tls-cert, the server's own certificate")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    key = settings.tls_key or settings.tls_cert
    try:
        # Without the callback, an encrypted key would ask for its password on the terminal.
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
    """Whether a worker could start with these files. Raises InvalidArgument."""
    server_context(settings)
    if settings.token_file is not None:
        Tokens.read(settings.token_file)
