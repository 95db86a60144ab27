"""Load tests of a server: `shorttail bench`.

traffic.py makes request templates from the user's options, rates.py parses rates, runner.py runs the native generator
and observes it, result.py computes the figures of a step, and report.py writes the HTML page. native/loadtest.h is the
generator itself.
"""
