"""The C sample: as users build it, and its arithmetic on 16-bit numbers."""

import subprocess

import numpy as np
import pytest
from native_programs import SAMPLES, SANITIZE, build_c, missing_tools, run_without_python

# Reads float32 numbers; for each, writes its half and that half as float32 again.
_HARNESS = """
#define main loraport_main
#include "SAMPLE"
#undef main
int main(void) {
  float value;
  (void)loraport_main;
  while (fread(&value, 4, 1, stdin) == 1) {
    const uint16_t half = float_to_half(value);
    const float back = half_to_float(half);
    fwrite(&half, 2, 1, stdout);
    fwrite(&back, 4, 1, stdout);
  }
  return 0;
}
"""


def test_the_check_as_users_build_it_passes(c_program, bundle):
    done = run_without_python(c_program, bundle)
    assert (done.returncode, done.stderr) == (0, "")


def test_halves_are_rounded_as_numpy_rounds_them(tmp_path):
    if missing_tools("cc", "npm"):
        pytest.skip("needs cc and npm")
    source = tmp_path / "harness.c"
    source.write_text(_HARNESS.replace("SAMPLE", str(SAMPLES / "c" / "loraport_check.c")))
    program = build_c(source, tmp_path / "harness", "-O1", *SANITIZE)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    random = np.random.default_rng(0)
    between = (halves[:-1] + halves[1:]) / 2  # ties, to even
    near = halves * (1 + random.normal(0, 1e-3, halves.shape)).astype(np.float32)
    values = np.concatenate([halves, between, near, [1e-9, -1e-9, 65519, 65520, -1e30]])
    values = values.astype(np.float32)
    done = subprocess.run([program], input=values.tobytes(), capture_output=True, check=True)
    got = np.frombuffer(done.stdout, np.dtype([("half", "<u2"), ("back", "<f4")]))
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(got["half"], expected.view(np.uint16))
    np.testing.assert_array_equal(got["back"], expected.astype(np.float32))
