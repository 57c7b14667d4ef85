"""Settings of the server."""

from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.errors import UsageError

POSITIVE = ("batch_size", "max_queue", "max_body_bytes", "timeout_seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Folders, address and limits of the server."""

    reverse: Path
    """Folder of the reverse model."""
    forward: Path | None = None
    """Folder of the forward model; without it only the reverse model's endpoints work."""
    direction: str | None = None
    """`reverse` for a reverse model whose config.json records no direction."""
    eod_id: int | None = None
    """Id of the eod of a reverse model whose config.json records no direction."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    """Key that each request must send as `Authorization: Bearer KEY`; None: no key."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the server."""
    batch_size: int = 16
    """Largest number of sequences in one batch."""
    batch_window_seconds: float = 0.004
    """Time for which the first request of a batch waits for others."""
    max_queue: int = 256
    """Largest number of waiting requests; a further one gets 429."""
    max_body_bytes: int = 4 << 20
    """Largest body of a request, in bytes; a larger one gets 413."""
    timeout_seconds: float = 300.0
    """Time after which a request that has no result gets 504."""
    log_text: bool = False
    """True: the log contains the bodies of requests."""

    def __post_init__(self) -> None:
        """Raise UsageError for values outside their range."""
        for name in POSITIVE:
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)}: it must be positive")
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"port={self.port} is not a port; pass a number from 0 (any free port) to 65535")
        if not 0 <= self.batch_window_seconds < 60:
            raise UsageError(f"batch_window_seconds={self.batch_window_seconds} must be from 0 to 60")
        if self.api_key == "":
            raise UsageError("the API key is empty, so everybody could call the server; pass one with characters, or none")
