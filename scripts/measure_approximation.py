"""Error of the attentions against full attention, on the queries, keys and values of a trained T2T-ViT.

Every photograph of DATA_DIR/SPLIT, or of --images, runs through the network with full attention; no labels are needed.
The inputs of the attention in the two token stages are then given to each attention in its place, and the relative
Frobenius error of its output, || out - full || / || full ||, is averaged over the photographs, and over seeds where
there is randomness. From the seeds also follow the bias, common to all of them, and the spread of one about it: their
squares add up. Some photographs, spread evenly, also give the error of the matrix of attention weights, and how sharp
full attention is: its effective number of keys (exp of the entropy of a query's weights) and its largest logit.

Columns of the table: `sizes` of window, features or clusters; `columns` of the attention matrix that they take;
`error of output`, mean and standard deviation over seeds; `of query part`, that error relative to the part of full
attention's output that depends on the query, || out - full || / || full - its mean over the queries ||; `bias`, the
error of the mean output over all seeds; `spread`, the root mean square deviation of one seed's output from that mean;
`matrix`, the error of the attention weights. All are relative: 0 is full attention, 1 as far off as an output of
zeros, or for the query part as full attention's mean output.

--layers measures the blocks of the backbone too, or alone: 197 tokens, the class token among them, in several heads of
width 64. There 1/32 is 6 columns only; give a larger --memory-fraction, such as 1/8. `columns` has what is
spent. An attention that is not defined at this length is left out, and a line says why.

    python scripts/measure_approximation.py --checkpoint FILE --data-dir data/flowers
    python scripts/measure_approximation.py --checkpoint FILE --images me.jpg photographs/
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from src.analysis.experiments.layer_errors import run
from src.analysis.tools import Parser, positive, run_tool
from src.models.attention_inputs import LAYERS


def build_parser() -> Parser:
    parser = Parser(__doc__, "checkpoint", "images", "split", "limit")
    parser.add("data-dir", required=False)
    add = parser.add_argument
    parser.add("attentions", default="local,performer,sblocal")
    add("--layers", choices=LAYERS, default="stages", help="token stages, blocks of the backbone, or all (stages)")
    seeds = {"type": positive, "default": 3, "metavar": "K"}
    add("--num-seeds", "--num-draws", **seeds, help="seeds of the random features (3)")
    add("--matrix-images", type=positive, default=12, metavar="N", help="photographs of the matrix errors (12)")
    add("--batch-size", type=positive, default=8, metavar="B", help="(8)")
    parser.add("memory-fraction", "seed", "device", "threads", "output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    command = shlex.join([Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
    return run_tool(build_parser, lambda arguments: run(arguments, command), argv)


if __name__ == "__main__":
    sys.exit(main())
