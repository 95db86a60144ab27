"""Coverage-guided fuzzing of the codec: libFuzzer (by Atheris) calls codec.check, and keeps inputs that reach new code.

`make fuzz` builds the kernels with ASan and UBSan for it. By hand: fuzz_codec.py CORPUS [-max_total_time=SECONDS], with
other flags of libFuzzer. A failing input is written to crash-... or timeout-...; give only its name to run it again.
Add it to test_codec.py before you fix the bug.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import atheris
import codec
import seeds

if __name__ == "__main__":
    if len(sys.argv) > 1 and Path(sys.argv[1]).is_dir():
        seeds.write(Path(sys.argv[1]))
    atheris.Setup(sys.argv, codec.check)
    atheris.Fuzz()
