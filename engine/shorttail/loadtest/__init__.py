"""Load tests of a server: `shorttail bench`.

plan.py turns what is asked into request templates, rates.py says how fast, runner.py runs the native generator and
watches it, result.py makes one step's figures, report.py the page. native/loadtest.h is the generator itself.
"""
