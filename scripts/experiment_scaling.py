"""How time and memory of the attentions grow with the sequence length N, from results of benchmark_attention.py.

The claim is that Scatterbrain is linear in N where full attention is quadratic (Chen et al., "Scatterbrain", NeurIPS
2021, section 4), with constant sizes (window, features, clusters). So the rows here are those whose sizes fit
--growth-length of the benchmark, at every N. The exponent is the slope of the logarithm of the time, or memory, of one
sequence against that of N, by least squares over the lengths from --fit-from on; below, what does not depend on N hides
the growth. The exponent of the last step is from the longest length but one to the longest.

On CUDA the time is that of the replay of a graph ("device"), without what the host needs to start the kernels, where
an attention and SDPA both have it at every length; otherwise, and on the CPU, it is that of the whole call ("call").

    python scripts/benchmark_attention.py --attentions cluster,sblocal --lengths 256,1024,4096,16384 --output cpu.json
    python scripts/experiment_scaling.py --inputs cpu.json --figure scaling.png
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.experiments.scaling import ATTENTION_LINES, FIT_FROM, run
from src.analysis.tools import Parser, positive, run_tool


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--inputs", nargs="+", required=True, metavar="FILE", help="of benchmark_attention.py, one for each device")
    parser.add("attentions", default=",".join(ATTENTION_LINES), help="those in a file are drawn (%(default)s)")
    add("--fit-from", type=positive, default=FIT_FROM, metavar="N", help=f"shortest length of the fit ({FIT_FROM})")
    parser.add("figure")
    return parser


main = partial(run_tool, build_parser, run)

if __name__ == "__main__":
    sys.exit(main())
