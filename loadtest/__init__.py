"""Load tests: locust drives a running server with chat, completion and mixed-length traffic.

`python -m loadtest` runs one scenario headless, bounded in users, requests and time, and writes a
report with plots; `locust -f loadtest/locustfile.py` runs the same scenarios with locust's own
page. A scenario is a YAML file in `loadtest/scenarios`.
"""
