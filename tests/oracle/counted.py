"""A package of coremltools with values of which it is known when it runs how many there are, for tests/coreml_read.rs:
the end of Stable Diffusion's safety checker, as Apple's converter writes it.

    python tests/oracle/counted.py          (Python 3.11, torch 2.4.1, coremltools 8.3.0, numpy 1.23.5)

Writes tests/fixtures/counted/iOS16.mlpackage, iOS17.mlpackage, which guards against negative indices, and cases.json:
inputs and what PyTorch makes of them.
"""

import json
import shutil
from pathlib import Path

import coremltools as ct
import numpy as np
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parents[1] / "fixtures" / "counted"


class End(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.concepts = torch.randn(17, 16)

    def forward(self, embeds, images):
        scores = F.normalize(embeds) @ F.normalize(self.concepts).transpose(0, 1) - 0.8
        held_back = scores.gt(0).float().sum(dim=1).gt(0)[:, None, None, None]
        everywhere, _ = torch.broadcast_tensors(held_back, images)
        images = images.clone()
        images[everywhere] = 0.0
        return images, held_back.float(), scores


torch.manual_seed(0)
end = End().eval()
shapes = dict(embeds=(1, 16), images=(1, 4, 5, 3))
traced = torch.jit.trace(end, tuple(torch.randn(shape) for shape in shapes.values()))
names = ["filtered_images", "has_nsfw_concepts", "concept_scores"]
shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir()
for target in [ct.target.iOS16, ct.target.iOS17]:
    model = ct.convert(
        traced,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        inputs=[ct.TensorType(name=name, shape=shape, dtype=np.float16) for name, shape in shapes.items()],
        outputs=[ct.TensorType(name=name, dtype=np.float32) for name in names],
        skip_model_load=True,
    )
    model.save(str(FOLDER / f"{target.name}.mlpackage"))
cases = []
for embeds in [torch.randn(1, 16), end.concepts[3:4] + 0.1 * torch.randn(1, 16)]:
    inputs = dict(embeds=embeds.half().float(), images=torch.randn(shapes["images"]).half().float())
    outputs = dict(zip(names, end(**inputs)))
    flat = lambda tensors: {name: [round(v, 6) for v in tensor.flatten().tolist()] for name, tensor in tensors.items()}
    cases.append(dict(inputs=flat(inputs), outputs=flat(outputs)))
(FOLDER / "cases.json").write_text(json.dumps(cases) + "\n")
print([case["outputs"]["has_nsfw_concepts"] for case in cases])
