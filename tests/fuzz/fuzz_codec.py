"""Coverage-guided fuzzing of the codec: libFuzzer (by Atheris) drives codec.check, and keeps what reaches new code.

`make fuzz` builds the kernels for it, with ASan and UBSan. By hand: fuzz_codec.py CORPUS [-max_total_time=SECONDS], and
other flags of libFuzzer. An input that fails is left as crash-... or timeout-...: give its name alone to run it again,
and make it a case of test_codec.py before you mend the bug.
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
