"""All benchmarks by name, in the order in which the README lists them."""

from __future__ import annotations

from umed_plugin.evaluation.benchmark import Benchmark
from umed_plugin.evaluation.med_grit import MED_GRIT
from umed_plugin.evaluation.medmnist import MEDMNIST
from umed_plugin.evaluation.medvh import MEDVH
from umed_plugin.evaluation.omnimedvqa import OMNIMEDVQA
from umed_plugin.evaluation.pmc_vqa import PMC_VQA
from umed_plugin.evaluation.vqa import SLAKE, VQA_RAD

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one for one in (VQA_RAD, SLAKE, PMC_VQA, MEDMNIST, OMNIMEDVQA, MEDVH, MED_GRIT)
}
