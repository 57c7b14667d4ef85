"""Settings of the server."""

from dataclasses import dataclass
from pathlib import Path

from megatron_ledom.errors import UsageError

POSITIVE = ("batch_size", "max_queue", "max_body_bytes", "timeout_seconds", "upstream_requests")

NEEDS = {"upstream_model": "upstream", "forward_upstream": "forward", "forward_upstream_model": "forward_upstream"}
"""Settings that another one must accompany."""


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
    upstream: str | None = None
    """Address of a completions server that runs the reverse model; None: the model runs in this process."""
    upstream_model: str | None = None
    """Name of the reverse model on that server; None: the only one there."""
    forward_upstream: str | None = None
    """Address of a completions server that runs the forward model."""
    forward_upstream_model: str | None = None
    """Name of the forward model on that server."""
    upstream_requests: int = 64
    """Most texts that each upstream writes at once for this server, and most that it scores at once."""
    check_upstream_weights: bool = False
    """True: an upstream's log-probabilities are compared with those of the folder's weights, however large these are."""
    key_over_http: bool = False
    """True: the key of an upstream may be sent by plain http to another machine."""
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
        for name, needed in NEEDS.items():
            if getattr(self, name) and not getattr(self, needed):
                raise UsageError(f"--{name.replace('_', '-')} needs --{needed.replace('_', '-')}; pass both, or neither")
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"port={self.port} is not a port; pass a number from 0 (any free port) to 65535")
        if not 0 <= self.batch_window_seconds < 60:
            raise UsageError(f"batch_window_seconds={self.batch_window_seconds} must be from 0 to 60")
        if self.api_key == "":
            raise UsageError("the API key is empty, so everybody could call the server; pass one with characters, or none")
