"""Trained Rank Pruning in a plain PyTorch loop: scikit-learn's digits, a small network."""

import torch
from sklearn.datasets import load_digits
from torch import nn

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
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
options = rp.TRP(rank=rp.Budget(flops=0.4), descent=100)

# begin
trp = rp.attach(model, optimizer, options, example_inputs=images[:1])  # rankprune
for _ in range(12):
    for batch in train[torch.randperm(len(train))].split(64):
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
plan = trp.finish()  # rankprune
# end

compact = rp.factorize(model, plan)
print(f"accuracy: projected {accuracy(model):.2%}, compact {accuracy(compact):.2%}")
print(rp.report(model, compact, example_inputs=images[:1]))
