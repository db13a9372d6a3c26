"""Trained Rank Pruning in an Accelerate loop, with gradient accumulation and clipping."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rankprune as rp

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
train, test = order[600:], order[:600]


def accuracy(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float((model(images[test]).argmax(1) == labels[test]).float().mean())


model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 48, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(768, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
options = rp.TRP(rank=rp.Energy(0.9), every=10, nuclear=1e-3)

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=32, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

# begin
trp = rp.attach(model, optimizer, options, example_inputs=images[:1])  # rankprune
for _ in range(12):
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
plan = trp.finish()  # rankprune
# end

model = accelerator.unwrap_model(model)
compact = rp.factorize(model, plan)
print(f"accuracy: projected {accuracy(model):.2%}, compact {accuracy(compact):.2%}")
print(rp.report(model, compact, example_inputs=images[:1]))
