"""``python -m bench.static``: the table of the compiled kernels as JSON, for the tests."""

import json

from bench.static.table import rows, violations

print(json.dumps([row | {"violations": violations(row)} for row in rows()]))
