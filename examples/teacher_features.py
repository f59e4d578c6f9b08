"""Features of a Hugging Face ViT, two layers, from a quarter of the tokens: the runtime against the model itself."""

import tempfile

import torch
from transformers import Dinov2Config, Dinov2Model

from cohobate.models import Precision
from cohobate.teacher import load_teacher

LAYERS = (3, 6)
torch.manual_seed(0)
model = Dinov2Model(Dinov2Config(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, image_size=224)).eval()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # a folder with downloaded weights, or a hub id, goes into the next line just as well
    dtypes = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
    teachers = [load_teacher(f"hf:{folder}", layers=LAYERS, precision=Precision(d, torch.float32)) for d in dtypes]
grid, mean, std = teachers[0].grid, torch.tensor(teachers[0].mean), torch.tensor(teachers[0].std)
pixels = torch.randint(0, 256, (2, *grid.pixel_shape), dtype=torch.uint8)  # [B, 1, H, W, 3], as a loader yields them
rows = torch.rand(2, grid.size).argsort(1)[:, : grid.size // 4].sort(1).values.int()  # each image its own quarter

with torch.no_grad():  # the original on the same tokens: those rows of its embedding, through its own blocks
    x = model.embeddings(((pixels[:, 0] / 255 - mean) / std).permute(0, 3, 1, 2))
    x = torch.stack([tokens[[0, *(1 + kept).tolist()]] for tokens, kept in zip(x, rows)])
    states = [x := block(x) for block in model.encoder.layer]
for teacher, (dtype, allowed) in zip(teachers, dtypes.items()):
    for layer, ours in zip(LAYERS, teacher(pixels, rows)):
        error = float((ours - states[layer - 1]).norm() / states[layer - 1].norm())
        print(f"{dtype}, layer {layer}, {rows.shape[1]} of {grid.size} patches: {error:.1e}, {error < allowed=}")
