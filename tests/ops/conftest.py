"""What the tests of the operator share is rewritten as tests are, and found by those in folders below."""

import pytest

pytest.register_assert_rewrite("kernel_cases")
