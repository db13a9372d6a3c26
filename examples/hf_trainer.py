"""Trained Rank Pruning under Hugging Face's Trainer: one callback."""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import rankprune as rp
from rankprune.integrations.transformers import RankPruneCallback

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
        return float((model(images[test])["logits"].argmax(1) == labels[test]).float().mean())


class Digits(nn.Module):
    """A small network, with its loss as the Trainer wants it."""

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

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixels)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


model = Digits()
dataset = [{"pixels": images[i], "labels": labels[i]} for i in train]
options = rp.TRP(rank=rp.Budget(flops=0.4), descent=100)

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        num_train_epochs=12,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    # begin
    prune = RankPruneCallback(options, example_inputs=images[:1])  # rankprune
    trainer = Trainer(
        model,
        args,
        train_dataset=dataset,
        callbacks=[prune],  # rankprune
    )
    trainer.train()
    # end

compact = rp.factorize(model, prune.plan)
print(f"accuracy: projected {accuracy(model):.2%}, compact {accuracy(compact):.2%}")
# of the network inside, whose output is a tensor, the report compares the answers as well
print(rp.report(model.net, compact.net, example_inputs=images[:1]))
