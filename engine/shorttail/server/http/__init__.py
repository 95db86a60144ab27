"""The HTTP server: probes, metrics, and the inference protocols of other servers. Needs the extra `http`."""
