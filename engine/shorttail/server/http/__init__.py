"""HTTP: probes, metrics, and inference as other servers and platforms speak it. Needs the extra `http`."""
