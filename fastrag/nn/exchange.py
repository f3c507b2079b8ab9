"""Ways in and out of a RagModel: folders, the Hugging Face Hub, and transformers' RAG models."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:
    from fastrag.data.processor import RagProcessor
    from fastrag.index import Index, PassageStore
    from fastrag.nn.model import RagModel


class Exchange:
    """Give RagModel the methods that read and write it."""

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        *,
        merge_adapter: bool = False,
        include_index: bool = False,
        card: str | None = None,
    ) -> None:
        """Write encoders, generator, tokenizers, template and settings as one folder.

        The folder appears whole or not at all; an older one stays until the new one is complete.

        Args:
            path: the folder; replaced if it is one of this kind.
            merge_adapter: merge a PEFT adapter into a copy of the generator instead of writing it
                as an adapter.
            include_index: also write index and passages. Otherwise the folder names the index by
                checksum, and `from_pretrained` is given both.
            card: text of a README.md, for example of `fastrag.nn.card.model_card`; None: no card.

        Raises:
            ValueError: a part cannot be saved (it is named), or the path cannot be replaced.
        """
        from fastrag.nn.checkpoint import save_model

        save_model(
            cast(Any, self),
            path,
            merge_adapter=merge_adapter,
            include_index=include_index,
            card=card,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        card: str | None = None,
        merge_adapter: bool = False,
        include_index: bool = False,
        **hub_settings: Any,
    ) -> Any:
        """Save the model with a card and upload it to the Hugging Face Hub.

        `RagModel.from_pretrained(repo_id)` reads it.

        Args:
            repo_id: such as "me/my-rag".
            card: the model card; None: `fastrag.nn.card.model_card`, without data and metrics.
            merge_adapter: as `save_pretrained`.
            include_index: as `save_pretrained`; passages become public with the repository.
            hub_settings: `private`, `token`, `revision`, `commit_message` and `create_pr` of
                `fastrag.nn.hub.push_folder`.

        Returns:
            huggingface_hub's CommitInfo.

        Raises:
            ValueError: as `save_pretrained`, or `repo_id` is no name of a repository.
            OSError: the Hub refuses, or cannot be reached.

        Example:
            >>> model.push_to_hub("me/my-rag", private=True)              # doctest: +SKIP
        """
        from fastrag.nn.card import model_card
        from fastrag.nn.hub import push_folder

        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.save_pretrained(
                folder,
                merge_adapter=merge_adapter,
                include_index=include_index,
                card=model_card(cast(Any, self), name=repo_id) if card is None else card,
            )
            return push_folder(folder, repo_id, **hub_settings)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        index: Index | None = None,
        passages: PassageStore | None = None,
        *,
        base_generator: nn.Module | None = None,
        generator_class: type | None = None,
        **overrides: Any,
    ) -> RagModel:
        """Read a folder that `save_pretrained` wrote, in eval mode.

        Args:
            path: the folder, or the Hub id of a repository that holds its files.
            index: the index; None: the one in the folder. Other content than that of the saved
                model's index gets a warning.
            passages: the passages; None: those in the folder.
            base_generator: the model under a PEFT adapter, if it cannot be found by its name.
            generator_class: class with `from_pretrained`, if the automatic class is another one.
            overrides: settings of the constructor that replace the stored ones.

        Returns:
            A RagModel.

        Raises:
            ValueError: a file is missing or of another configuration, there is no index, or it has
                another width or length than encoder and passages.
        """
        from fastrag.nn.checkpoint import load_model

        return load_model(
            cast(Any, cls),
            path,
            index,
            passages,
            base_generator=base_generator,
            generator_class=generator_class,
            overrides=overrides,
        )

    @classmethod
    def from_hf(
        cls,
        model: Any,
        index: Index | None = None,
        passages: PassageStore | None = None,
        *,
        processor: RagProcessor | None = None,
        question_tokenizer: Any = None,
        generator_tokenizer: Any = None,
        **settings: Any,
    ) -> RagModel:
        """Compose a model of the parts of a RAG model of Hugging Face, which it shares.

        A context encoder, which transformers saves but does not load again, becomes the passage
        encoder. tau is 1, because transformers does not divide scores.

        Args:
            model: transformers' `RagTokenForGeneration` or `RagSequenceForGeneration`, or the
                folder or Hub id of a saved one.
            index: vectors of the passages; None with `passages`: those of the model's retriever
                (all vectors of its dataset, searched exactly), or those that its config names.
            passages: the passages of the index.
            processor: tokenizers and template; None: `fastrag.hf.rag_processor`, which writes
                contexts as the model's config says.
            question_tokenizer: the question encoder's; None: that of the retriever or the folder.
            generator_tokenizer: likewise.
            settings: arguments of the constructor that replace those from the config.

        Returns:
            A RagModel, in the mode of the model.

        Raises:
            ValueError: another class, weights are missing, there is no tokenizer or no index, or
                the parts do not fit each other.

        Example:
            >>> model = RagModel.from_hf("models/rag-token-nq", index, passages)  # doctest: +SKIP
        """
        from fastrag.hf.convert import from_hf

        tokenizers = (question_tokenizer, generator_tokenizer)
        return from_hf(cast(Any, cls), model, index, passages, processor, tokenizers, settings)

    def to_hf(self) -> Any:
        """Compose transformers' RAG model of the parts of this one, which it shares.

        It retrieves from this model's index. A passage encoder goes with it and is saved with it;
        objective and exploring, settings of training, have no place there.

        Returns:
            A `RagTokenForGeneration` or `RagSequenceForGeneration`, in the mode of this model.

        Raises:
            ValueError: a part that transformers' class has no place for: a decoder-only generator,
                PEFT adapters, tau other than 1, an encoder with normalisation, prefix or another
                pooling than "pooler", or a template with another order.

        Example:
            >>> model.to_hf().save_pretrained("models/rag")               # doctest: +SKIP
        """
        from fastrag.hf.convert import to_hf

        return to_hf(cast(Any, self))
