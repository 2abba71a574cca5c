"""All benchmarks by name, in the order in which docs/evaluation.md lists them."""

from __future__ import annotations

from umed_plugin.evaluation.benchmarks.benchmark import Benchmark
from umed_plugin.evaluation.benchmarks.med_grit import MED_GRIT
from umed_plugin.evaluation.benchmarks.medmnist import MEDMNIST
from umed_plugin.evaluation.benchmarks.medvh import MEDVH
from umed_plugin.evaluation.benchmarks.omnimedvqa import OMNIMEDVQA
from umed_plugin.evaluation.benchmarks.pmc_vqa import PMC_VQA
from umed_plugin.evaluation.benchmarks.vqa import SLAKE, VQA_RAD

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one for one in (VQA_RAD, SLAKE, PMC_VQA, MEDMNIST, OMNIMEDVQA, MEDVH, MED_GRIT)
}
