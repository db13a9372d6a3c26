"""Trained Rank Pruning under Lightning's Trainer: one callback."""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rankprune as rp
from rankprune.integrations.lightning import RankPruneCallback

pl.seed_everything(0)
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


class Digits(pl.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(768, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


module = Digits()
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)
options = rp.TRP(rank=rp.Budget(flops=0.4), descent=100)

# begin
prune = RankPruneCallback(options, example_inputs=images[:1])  # rankprune
trainer = pl.Trainer(
    callbacks=[prune],  # rankprune
    max_epochs=12,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, loader)
# end

compact = rp.factorize(module, prune.plan)
print(f"accuracy: projected {accuracy(module):.2%}, compact {accuracy(compact):.2%}")
print(rp.report(module, compact, example_inputs=images[:1]))
