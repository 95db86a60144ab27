"""Every limit in one place, with its unit last in its name; and the version of this package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

try:
    VERSION: Final = version("shorttail")
except PackageNotFoundError:  # run from a source tree that was not installed
    VERSION: Final = "0"  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class Limits:
    # One request.
    frame_bytes: int = 16 << 20  # a MessagePack message, header to end
    nesting_depth: int = 8  # [0, id, method, [model, {column: [[...]]}, {...}]] needs 6
    declared_elements: int = 4_000_000  # array items and map pairs announced by one message
    rows_per_request: int = 16_384
    string_bytes: int = 65_535  # one string value in a request or a row

    # One turn of the loop.
    batch_rows: int = 16_384  # a batch that is full runs, and the next one starts
    loop_stall_us: float = 2_000.0  # a model that needs longer for its batch runs in another thread
    model_threads: int = 4  # of such models run at the same time
    adaptive_poll_us: int = 100  # a loop that is asked again within this most of the time does not sleep in between

    # Loading a model.
    warm_run_us: float = 20_000.0  # a warm-up goes no further once a batch takes this long,
    warm_bytes: int = 64 << 20  # nor to batches whose inputs are larger
    bucket_rows: int = 4096  # padded batches: the largest; a power of two
    versions_asked: int = 4  # versions that stay loaded because requests named them

    # One connection.
    output_high_water_bytes: int = 4 << 20  # above this its requests are no longer read
    output_low_water_bytes: int = 1 << 20
    pushes_per_connection: int = 1024  # pushes and deletes that wait for their commit
    requests_per_connection: int = 16_384  # in flight
    stranger_frame_bytes: int = 16 << 10  # a message before `auth`, where a token is wanted
    stranger_requests: int = 8  # before the right token
    stranger_deadline_s: int = 10  # from connecting to the right token
    frame_deadline_s: int = 30  # from the first byte of a message to its last
    write_deadline_s: int = 30  # what is owed to a client has left by then, or the client is cut off
    idle_deadline_s: int = 3600  # without a byte, and nothing in flight

    # All connections of a worker.
    connections: int = 16_384
    waiting_rows: int = 524_288  # parsed, and not answered yet
    waiting_bytes: int = 256 << 20  # the same, as they came on the wire
    kept_bytes: int = 16 << 20  # in an overload read in a turn before any of it is admitted
    p99_budget_ms: float = 50.0  # what an accepted request may take under overload

    # HTTP, of one worker.
    http_connections: int = 1024
    http_requests: int = 1024  # in flight
    http_body_bytes: int = 256 << 20  # bodies that are being read
    http_json_bytes: int = 4 << 20  # more would hold up the loop while it is parsed; tensors as bytes may be larger
    http_header_s: float = 10.0  # from connecting to the first request's headers
    http_read_s: float = 30.0  # from a request's headers to the end of its body
    http_idle_s: float = 75.0  # between requests on a connection

    # Logs.
    log_lines_per_s: int = 50  # of failed and slow requests, of one worker
    traceparent_bytes: int = 128  # a longer one is ignored; version 00 has 55
    traced_failures: int = 50  # requests with a traceparent that fail within a tenth of a second, and have a line each

    # Writing through a server.
    forwarded_bytes: int = 64 << 20  # one worker's pushes and deletes that the writer has not answered
    queued_rows: int = 262_144  # in the writer, waiting for the next commit, of all workers
    queued_bytes: int = 256 << 20  # the same, as they came on the wire
    commit_rows: int = 65_536  # one group commit, so that its dirty pages fit LMDB's list
    commit_bytes: int = 32 << 20  # the same, as they came on the wire

    # On-demand functions.
    on_demand_depth: int = 8  # functions whose arguments are functions
    constant_elements: int = 65_536  # of a NumPy array that a function uses

    # Caches.
    feature_plans_cached: int = 256  # distinct lists of feature references
    feature_list_bytes: int = 65_536  # one such list on the wire; what a cached plan's key may weigh

    # The store.
    map_bytes: int = 256 << 30  # address space, not disk: LMDB grows the file as it is written
    readers: int = 1024
    views: int = 4096
    change_log_commits: int = 4096  # a reader further behind than this rebuilds its directories
    change_log_bytes: int = 64 << 20  # the log is kept to so much, whatever the number of commits
    drop_commit_pages: int = 16_384  # a table that is not needed any more is deleted so many pages a commit
    load_commit_bytes: int = 32 << 20  # a bulk load commits this much at a time, while other writers wait
    load_memory_bytes: int = 1 << 30  # what a bulk load takes in memory unless it is told otherwise
    load_memory_bytes_min: int = 4 << 20
    idle_rest_ms: int = 1000  # a snapshot that is out of date and not in use gives its pages back this soon
    reader_check_ms: int = 1000  # a writer frees what dead readers hold no more often than this
    idle_refresh_ms: int = 100  # an idle worker moves its snapshot forward this often

    # The server.
    stop_grace_s: float = 10.0  # from SIGTERM until connections with work in flight are cut
    start_timeout_s: float = 120.0
    hang_deadline_s: int = 10  # a worker whose loop has not come round for so long is killed, and another started
    writer_start_wait_s: float = 2.0  # a worker serves without the writer if that takes longer
    restart_backoff_min_s: float = 0.1
    restart_backoff_max_s: float = 10.0

    # Clients.
    client_connections: int = 1024  # of one client
    client_retries: int = 100  # of one call
    client_backoff_min_s: float = 0.01
    client_backoff_max_s: float = 1.0
    client_retry_ratio: float = 0.2  # a call earns so many retries
    client_retries_saved: float = 10_000.0  # earned and not used
    client_retry_reserve: float = 100.0  # what a client starts with

    # Load tests.
    bench_rate_per_s: float = 10e6
    bench_steps: int = 200  # of a sweep
    bench_duration_s: float = 86_400.0  # of a step
    bench_in_flight: int = 1 << 20  # connections times pipeline: each is a slot of 40 bytes
    bench_threads: int = 64
    bench_key_rows: int = 1_000_000  # keys read from a file or a store
    bench_intervals: int = 120  # points of latency over time; a histogram each
    bench_verified: int = 200  # answers kept for --verify
    bench_metrics_bytes: int = 16 << 20  # of /metrics, read before and after a step


LIMITS: Final = Limits()

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 7711
DEFAULT_HTTP_PORT: Final = 7712
