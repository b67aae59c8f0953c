"""``python -m bench.static``: as JSON, for the tests, which cases there are and the rows of a few of them."""

import json

from bench.static import cases, table
from bench.static.cuda import cuda_rows

print(
    json.dumps(
        {
            "cases": [[case.name, case.dtype, str(case.target.arch)] for case in cases.all_cases()],
            "rows": table.triton_rows(cases.tested_cases()),
            "cuda": cuda_rows(),
            "compilers": table.compilers(),
        }
    )
)
