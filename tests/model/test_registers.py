"""Where products in registers are offered."""

import os
import subprocess
import sys


def test_a_cpu_without_the_instruction_is_not_asked_for_it() -> None:
    """A compiler that met it would end the process."""
    script = "from model.kernels import attention_core, products, registers; print(registers.available())"
    generic = {**os.environ, "NUMBA_CPU_NAME": "generic"}
    asked = subprocess.run([sys.executable, "-c", script], env=generic, capture_output=True, text=True, timeout=120)
    assert (asked.returncode, asked.stdout) == (0, "False\n"), asked.stderr
