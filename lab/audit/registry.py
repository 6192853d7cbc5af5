"""The attacks by name; adding one is a line here."""

from __future__ import annotations

from lab.audit.base import Attack
from lab.registry import Registry

ATTACKS: Registry[type[Attack]] = Registry(
    "attack",
    {
        "forms": "lab.audit.forms:Forms",
        "in_context": "lab.audit.context:InContext",
        "step_by_step": "lab.audit.context:StepByStep",
        "two_hop": "lab.audit.context:TwoHop",
        "suffix": "lab.audit.suffix:Suffix",
        "latent": "lab.audit.latent:Latent",
        "steering": "lab.audit.steering:Steering",
        "sampling": "lab.audit.sampling:Sampling",
        "relearn": "lab.audit.relearn:Relearn",
        "quantize": "lab.audit.weights:Quantize",
        "prune": "lab.audit.weights:Prune",
        "adapter_removal": "lab.audit.weights:AdapterRemoval",
        "indirect": "lab.audit.indirect:Indirect",
        "hidden_knowledge": "lab.audit.inside:HiddenKnowledgeAttack",
        "concept_trace": "lab.audit.inside:ConceptTrace",
        "patching_depth": "lab.audit.inside:PatchingDepth",
        "trace": "lab.audit.fingerprints:Trace",
        "spectral": "lab.audit.fingerprints:Spectral",
    },
    group="knowlab.attacks",
)
