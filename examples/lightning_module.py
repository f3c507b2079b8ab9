"""Train under Lightning; its checkpoint names the index by folder and checksum.

python examples/lightning_module.py ENCODER GENERATOR [FOLDER]
"""

import sys

import lightning
import torch
from capitals import rag_model
from torch.utils.data import DataLoader

from fastrag import RagModel
from fastrag.train import parameter_groups


class RagModule(lightning.LightningModule):
    def __init__(self, model: RagModel) -> None:
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.model, retriever_lr=1e-4, reader_lr=1e-3))


lightning.seed_everything(0)
encoder, generator, folder = [*sys.argv[1:], "runs/lightning"][:3]
model, questions = rag_model(encoder, generator)
model.index.save(f"{folder}/index")
data = DataLoader(questions, batch_size=16, collate_fn=model.processor.collate)
trainer = lightning.Trainer(max_epochs=1, default_root_dir=folder, logger=False)
trainer.fit(module := RagModule(model), data)
path = f"{folder}/last.ckpt"
trainer.save_checkpoint(path)
again = RagModule.load_from_checkpoint(path, model=rag_model(encoder, generator)[0])
