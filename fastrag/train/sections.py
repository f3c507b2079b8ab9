"""The sections of `RagConfig`: each names the settings of one part of the system.

The docstring of a section is the help of its options; `RagConfig` checks ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RetrieverConfig:
    """Encoders, index and search.

    Args:
        question_encoder: model folder or Hub id of the question encoder; required.
        passage_encoder: model folder or Hub id of the passage encoder; null: that of the question
            encoder.
        index: folder written by `fastrag index build`; null: build one in the
            run folder.
        index_dtype: how a new index stores vectors.
        index_device: auto, where the model trains; cpu, in host memory; stream, in host memory and
            searched where the model trains.
        n_docs: passages per question, K.
        tau: temperature of the scores; null takes 1, or .05 for encoders that normalise.
        learn_tau: train the temperature.
        train_passage_encoder: encode the K passages of a step with gradient.
        rescore: number of candidates of each question that are found among the stored vectors and
            encoded again, before the best n_docs are chosen by their fresh scores; null: the
            nearest stored vectors are used.
        passage_batch: passages per pass of the passage encoder in a training step; the activations
            of each pass are computed once more in backward, so memory does not grow with n_docs;
            null: all at once.
        explore: number of the K passages that are drawn from the softened prior in training.
        explore_pool: number of candidates that they are drawn from; null: all passages.
        explore_tau: temperature that softens the prior they are drawn from.
        null_passage: add a passage without text to the K passages of each question.
        tau_start: temperature at the start of training, from which it falls to tau; null: tau.
        tau_steps: steps after which it has reached tau.
        freeze_steps: steps at the start in which only the generator trains.
        learning_rate: learning rate of both encoders and the temperature.
    """

    question_encoder: str = ""
    passage_encoder: str | None = None
    index: str | None = None
    index_dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    index_device: Literal["auto", "cpu", "stream"] = "auto"
    n_docs: int = 5
    tau: float | None = None
    learn_tau: bool = False
    train_passage_encoder: bool = False
    rescore: int | None = None
    passage_batch: int | None = None
    explore: int = 0
    explore_pool: int | None = 256
    explore_tau: float = 1.0
    null_passage: bool = False
    tau_start: float | None = None
    tau_steps: int = 0
    freeze_steps: int = 0
    learning_rate: float = 2e-5


@dataclass
class LoraConfig:
    """LoRA adapters on the generator.

    Args:
        rank: rank of the adapters; null: no LoRA, all weights train.
        alpha: scale of the adapters; null: twice the rank.
        dropout: dropout before the adapters.
        targets: names of layers, all-linear, or a regular expression for their paths.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"


@dataclass
class ReaderConfig:
    """The generator.

    Args:
        generator: model folder or Hub id of the seq2seq or causal language model; required.
        dtype: how its weights are kept: float32, bfloat16 (the optimiser then updates float32
            copies), or auto: float32, except for weights stored in bfloat16 that LoRA leaves
            unchanged, with training.bf16.
        train: false: the generator stays as it is, and only the retriever trains.
        likelihoods: folder in which log p(y|x,z) of a generator that does not train is kept, so
            that each context is read once; null: it is read in each step.
        lora: LoRA adapters.
    """

    generator: str = ""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    train: bool = True
    likelihoods: str | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class LossConfig:
    """The marginal likelihood, see `fastrag.RagLoss`.

    Args:
        marginal: token or sequence (Lewis et al. 2020, section 2.1).
        objective: marginal, emdr2, pdist, replug, topk:<passages to read>, or jsa:<steps of the
            chain>.
        tau_lm: temperature of the generator's distribution over passages, in pdist and replug.
        label_smoothing: epsilon of label smoothing, in [0, 1).
        prune: read with gradient only contexts whose posterior exceeds this, in [0, 1); null: all.
        prune_unbiased: read some of the other contexts at random, so that the expected gradient is
            that of all.
        posterior_encoder: model folder or Hub id of the encoder of question and answer, for jsa;
            null: the prior takes its place.
        in_batch: weight of the term that scores the passages of a question above those of the
            others in its batch.
        contrastive: weight of the term that scores the positive passages of a question above all
            others in its batch.
    """

    marginal: Literal["token", "sequence"] = "token"
    objective: str = "marginal"
    tau_lm: float = 1.0
    label_smoothing: float = 0.0
    prune: float | None = None
    prune_unbiased: bool = False
    posterior_encoder: str | None = None
    in_batch: float = 0.0
    contrastive: float = 0.0


@dataclass
class DataConfig:
    """Corpus, questions, and how both are tokenised.

    Args:
        corpus: passages file (JSONL, CSV, TSV), or `default` for the embedded data set; null:
            default. With retriever.index, the passages are those of the index.
        train_questions: questions file, or default:<split>.
        eval_questions: questions file for evaluations, or default:<split>; null: no evaluation.
        template: plain, chat, or a mapping of the fields of a `Template`.
        max_question: question tokens of the retriever; longer questions are cut.
        max_passage: passage tokens of the passage encoder; longer passages are cut when the index
            is built. null: 256. With retriever.index, passages were cut when it was built.
        max_context: tokens of the generator's input.
        max_answer: answer tokens.
        answer_choice: train on the first or a random answer.
        force_labelled: put the passages of a question's positive_ids and negative_ids among its K.
        exclude_source: do not retrieve the passages of a question's source_ids for it.
    """

    corpus: str | None = None
    train_questions: str = "default:train"
    eval_questions: str | None = None
    template: dict[str, str | bool | None] | str = "plain"
    max_question: int = 64
    max_passage: int | None = None
    max_context: int = 512
    max_answer: int = 32
    answer_choice: Literal["first", "random"] = "first"
    force_labelled: bool = False
    exclude_source: bool = False


@dataclass
class RefreshConfig:
    """When the vectors of the index are recomputed.

    Args:
        policy: frozen; every:<steps>; rolling:<passages per step>; drift:<limit>; map; several
            joined with +, or a schedule such as 0-1000:rolling:64, 1000-:drift:0.02.
        batch_size: passages per batch when the index is built or refreshed.
        samples: passages that are drawn uniformly and encoded in each step to measure how stale
            the index is; null: as many as the policy asks for.
        worker: device of a process of its own that encodes, such as cuda:1; null: the training
            process encodes.
    """

    policy: str = "frozen"
    batch_size: int = 64
    samples: int | None = None
    worker: str | None = None


@dataclass
class EvaluationConfig:
    """Measures of an evaluation.

    Args:
        at_start: what to measure before training: retrieval (recall@k, in seconds), full (answers
            and loss as well), or none.
        limit: number of fixed questions to evaluate on; null: all.
        ks: the k of recall@k.
        max_new_tokens: longest generated answer.
        early_stopping: number of evaluations without a better training.metric_for_best_model after
            which training stops; null: never stop early.
    """

    at_start: Literal["retrieval", "full", "none"] = "retrieval"
    limit: int | None = 200
    ks: list[int] = field(default_factory=lambda: [1, 5])
    max_new_tokens: int = 32
    early_stopping: int | None = None
