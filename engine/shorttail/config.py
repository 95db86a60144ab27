"""All limits of the package, each with its unit last in its name, and the version of the package."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Final

try:
    VERSION: Final = version("shorttail")
except PackageNotFoundError:  # run from a source tree that was not installed
    VERSION: Final = "0"  # type: ignore[misc]


COMMANDS_VERSION: Final = 1  # of the steps of the method `command`, and of what a client sends with one


@dataclass(frozen=True, slots=True)
class Limits:
    """Every limit, as its largest permitted value unless the comment says otherwise."""

    # Per request.
    frame_bytes: int = 16 << 20  # one whole MessagePack message
    nesting_depth: int = 8  # [0, id, method, [model, {column: [[...]]}, {...}]] needs 6
    declared_elements: int = 4_000_000  # array items and map pairs that one message declares
    json_containers: int = 1_000_000  # arrays and objects in a body of JSON
    rows_per_request: int = 16_384
    string_bytes: int = 65_535  # one string value in a request or in a row
    name_bytes: int = 255  # one name in UTF-8, which is also what file systems take as the name of a folder
    suggestion_steps: int = 250_000  # compared characters in the search for a name that resembles an unknown name
    raw_output_bytes: int = 64 << 20  # all outputs of one request of tensors; a graph may make them of any size
    reply_values: int = 4_000_000  # rows times features, a vector counted by its width
    reply_bytes: int = 64 << 20
    call_bytes: int = 16 << 10  # a message of a method that is neither batched nor a write

    # Per request that the event loop reads itself. The bulk worker answers larger ones (server/bulk.py).
    loop_bytes: int = 1 << 20  # of MessagePack, and of tensors over HTTP
    loop_elements: int = 131_072  # array items and map pairs of a MessagePack request
    loop_uncommon_values: int = 4096  # values that Python has to convert
    loop_references: int = 512  # features of a list that has no plan yet
    loop_values: int = 262_144  # rows times Plan.row_work: numbers that are looked up, copied and computed
    loop_text_bytes: int = 32 << 10  # of JSON
    loop_csv_bytes: int = 8 << 10  # of CSV
    loop_csv_fields: int = 512
    loop_reply_values: int = 65_536  # of an answer in JSON or CSV
    loop_reply_tensor_values: int = 1 << 20  # of an answer in tensors

    # Per turn of the event loop.
    batch_rows: int = 16_384  # a full batch runs and the next batch starts
    loop_stall_us: float = 2_000.0  # a model whose batch takes longer runs in a thread instead of the event loop
    model_threads: int = 4  # such models that run at the same time
    run_timeout_s: float = 5.0  # of a run of a model, unless Model(run_timeout=) says otherwise
    loop_run_s: float = 0.1  # of a run on the event loop, which is then repeated in a thread
    example_run_s: float = 1.0  # a model whose example ran this recently is not tried again before blaming a request
    adaptive_poll_us: int = 100  # the loop polls instead of sleeping if most requests come sooner than this

    # Loading a model.
    warm_run_us: float = 20_000.0  # warm-up tries no larger batch once a batch takes this long
    warm_bytes: int = 64 << 20  # input bytes of the largest warm-up batch
    bucket_rows: int = 4096  # rows of the largest padded batch; a power of two
    example_rows: int = 10_000  # rows with expected outputs, which every load of a model compares
    example_bytes: int = 64 << 20  # their inputs and outputs together
    row_check_s: float = 10.0  # how long `apply` compares answers for rows in different runs
    versions_asked: int = 4  # versions that stay loaded only because requests named them

    # Requests that make a model fail.
    suspect_requests: int = 3  # from one sender lately; its next requests are batched apart from others
    suspect_s: float = 30.0  # for how long
    refusals_kept: int = 4096  # per model: requests that are refused again without a run
    refusal_kept_s: float = 2.0  # for how long
    refusal_bytes: int = 4096  # input bytes of such a request
    senders_blamed: int = 4096  # remembered per worker

    # Per connection.
    output_high_water_bytes: int = 4 << 20  # above this much unsent output, requests are no longer read
    output_low_water_bytes: int = 1 << 20  # below this much unsent output, requests are read again
    pushes_per_connection: int = 1024  # pushes and deletes that wait for their commit
    requests_per_connection: int = 16_384  # requests in flight
    stranger_frame_bytes: int = 16 << 10  # one message of a client that has not authenticated but must
    stranger_requests: int = 8  # requests before the right token
    stranger_deadline_s: int = 10  # from connecting to the right token
    frame_deadline_s: int = 30  # from the first byte of a message to its last
    write_deadline_s: int = 30  # a client that has not taken its output by then is disconnected
    idle_deadline_s: int = 3600  # without a byte received and without a request in flight

    # Per worker, over all its connections.
    connections: int = 16_384
    waiting_rows: int = 524_288  # rows of requests that are parsed and not answered
    waiting_bytes: int = 256 << 20  # bytes on the wire of these requests
    kept_bytes: int = 16 << 20  # under overload: bytes read in a loop turn before any request is admitted
    p99_budget_ms: float = 50.0  # target for accepted requests under overload

    # HTTP, per worker.
    http_connections: int = 1024
    http_requests: int = 1024  # requests in flight
    http_body_bytes: int = 256 << 20  # all bodies that are being read
    http_reserve: int = 64  # connections beyond http_connections, for probes and metrics alone
    http_header_s: float = 10.0  # from connecting to the end of the first request's headers
    http_read_s: float = 30.0  # from a request's headers to the end of its body
    http_linger_s: float = 1.0  # how long the rest of a body is read that nobody wants
    http_idle_s: float = 75.0  # between requests on a connection

    # Large requests, which the bulk worker answers.
    bulk_requests: int = 64  # in flight, per worker
    bulk_bytes: int = 256 << 20  # of these requests and their answers, per worker
    bulk_idle_s: float = 600.0  # the bulk worker ends after this time without a request

    # Logs.
    log_lines_per_s: int = 50  # lines about failed and slow requests, per worker
    repeated_line_s: float = 10.0  # between two lines that say that connections are refused
    traceparent_bytes: int = 128  # a longer header is ignored; version 00 has 55 bytes
    traced_failures: int = 50  # failed requests with a traceparent that get a log line each, per 100 ms

    # Writing through a server.
    forwarded_bytes: int = 64 << 20  # pushes and deletes of one worker that the writer has not answered
    queued_rows: int = 262_144  # rows of all workers that wait in the writer for the next commit
    queued_bytes: int = 256 << 20  # bytes on the wire of these rows
    commit_rows: int = 65_536  # rows of one group commit; its dirty pages must fit LMDB's list
    commit_bytes: int = 32 << 20  # bytes on the wire of one group commit

    # Commands that clients run on a server's store.
    commands: int = 4  # at the same time
    command_bytes: int = 1 << 30  # of the files that a client sends with one
    command_files: int = 8192
    command_piece_bytes: int = 256 << 10  # of a file, in one request
    command_output_bytes: int = 1 << 20  # output that its client has not taken; then the command waits
    command_silence_s: float = 15.0  # a command whose client was not heard for so long is ended

    # Registering models.
    vet_s: float = 120.0  # how long one look at a file may take, in a process that is killed then

    # On-demand functions.
    on_demand_depth: int = 8  # levels of functions that take other functions as arguments
    constant_elements: int = 65_536  # elements of a NumPy array that a function uses as a constant

    # Caches.
    feature_plans_cached: int = 256  # distinct lists of feature references
    feature_list_bytes: int = 65_536  # one such list on the wire, which is the key of a cached plan

    # The store.
    map_bytes: int = 256 << 30  # address space, not disk: LMDB grows the file as it is written
    readers: int = 1024  # read transactions open at the same time, over all processes
    views: int = 4096
    change_log_commits: int = 4096  # a reader that is further behind rebuilds its directories
    change_log_bytes: int = 64 << 20  # the log is cut to this size even if it holds fewer commits
    drop_commit_pages: int = 16_384  # pages that one commit deletes when a table is dropped
    load_commit_bytes: int = 32 << 20  # pages in one commit of a bulk load, for which other writers wait
    load_memory_bytes: int = 1 << 30  # default memory budget of a bulk load
    load_memory_bytes_min: int = 4 << 20  # smallest memory budget of a bulk load
    shrink_rows_min: int = 1000  # a load of less than half of the rows of a view with at least so many is refused
    max_clock_skew_us: int = 3_600_000_000  # default of a store's setting: how far event times may be ahead
    idle_rest_ms: int = 1000  # how often snapshots that are stale and not in use are released
    scan_idle_s: float = 30.0  # a scan from which no batch is taken for so long is ended
    reader_check_ms: int = 1000  # shortest time between two clean-ups of dead readers by a writer
    idle_refresh_ms: int = 100  # how often an idle worker moves its snapshot forward

    # The server.
    stop_grace_s: float = 10.0  # from SIGTERM until connections with requests in flight are closed
    start_timeout_s: float = 120.0  # a worker that is not ready by then is killed
    hang_deadline_s: int = 10  # a worker whose event loop has been stuck this long is killed and replaced
    writer_start_wait_s: float = 2.0  # a worker starts to serve without the writer after this wait
    model_deaths: int = 2  # workers that died in runs of a model version, which is then not run any more
    load_kills: int = 3  # workers that were killed (SIGKILL) while they loaded a version, which is then not loaded
    model_deaths_s: float = 3600.0  # both within this time
    restart_backoff_min_s: float = 0.1
    restart_backoff_max_s: float = 10.0

    # Clients.
    client_connections: int = 1024  # per client
    client_retries: int = 100  # per call
    client_backoff_min_s: float = 0.01
    client_backoff_max_s: float = 1.0
    client_retry_ratio: float = 0.2  # retry tokens that each call adds to the client's retry budget
    client_retries_saved: float = 10_000.0  # most tokens in the retry budget
    client_retry_reserve: float = 100.0  # tokens in the retry budget of a new client

    # Load tests.
    bench_rate_per_s: float = 10e6
    bench_steps: int = 200  # per sweep
    bench_duration_s: float = 86_400.0  # per step
    bench_in_flight: int = 1 << 20  # connections times pipeline; each is a slot of 40 bytes
    bench_threads: int = 64
    bench_key_rows: int = 1_000_000  # keys read from a file or a store
    bench_intervals: int = 120  # points of latency over time; each has a histogram
    bench_verified: int = 200  # answers kept for --verify
    bench_metrics_bytes: int = 16 << 20  # one reading of /metrics; it is read before and after a step


LIMITS: Final = Limits()

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 7711
DEFAULT_HTTP_PORT: Final = 7712
