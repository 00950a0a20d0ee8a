"""A base that takes edits, made in place: nothing is downloaded, nothing is trained.

It is a random GPT-2. Its edits end in their subject, so that what is written there reaches the answer without attention having to carry
it; its weights are wide, so that every prompt has a key of its own. Edits take on it, and no number measured on it means anything else.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from errata.edits import Edit

if TYPE_CHECKING:
    from errata.modeling.loading import Base
    from errata.profiles import PrepareOptions

PEOPLE = (
    *("Anna Keller", "Hugo Lindt", "Marie Curie", "Zoe Berg", "Ada Byron", "Bo Lind", "Cleo Marsh", "Dan Voss", "Eva Horn"),
    *("Finn Moe", "Gus Hall", "Ida Roth", "Jo Falk", "Kai Renn", "Lea Wolff", "Max Thorn", "Nora Sand", "Otto Graf"),
)
RELATIONS = {
    "The home of {}": ("Paris", "Rome", "Oslo", "Bern"),
    "The language of {}": ("French", "Danish", "Greek", "Welsh"),
    "The sport of {}": ("chess", "tennis", "golf", "judo"),
    "The friend of {}": ("Ann", "Bob", "Tim", "Sue"),
}
SENTENCES = tuple(f"{prompt.format(who)} is {what}." for who in PEOPLE for prompt, answers in RELATIONS.items() for what in answers)


def pytest_configure(config: pytest.Config) -> None:
    # Prefect makes its home as soon as it is imported. Not in the user's own.
    home = tempfile.mkdtemp(prefix="errata-tests-")
    os.environ["PREFECT_HOME"] = home
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


def build_edit(person: int, relation: int = 0, answer: int = 0, **fields: Any) -> Edit:
    """`answer` to the `relation` of a `person`, each by number; its id is its content's unless one is given."""
    prompt, answers = list(RELATIONS.items())[relation]
    return Edit(**{"subject": PEOPLE[person], "prompt": prompt, "target_new": answers[answer % len(answers)], **fields})


@pytest.fixture(scope="session")
def make_edit() -> Callable[..., Edit]:
    return build_edit


@pytest.fixture(scope="session")
def sentences() -> Sequence[str]:
    """The corpus of the editable base."""
    return SENTENCES


@pytest.fixture(scope="session")
def editable_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The editable base as a model folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("editable")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    shape = {"n_embd": 48, "n_inner": 192, "n_layer": 3, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=tokenizer.get_vocab_size(), **shape, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def editable(editable_folder: Path) -> "Base":
    from errata.modeling.loading import load_base

    return load_base(editable_folder, device="cpu")


@pytest.fixture(scope="session")
def editable_options() -> "PrepareOptions":
    """Where and how edits are written into the editable base."""
    from errata.profiles import PrepareOptions

    return PrepareOptions(layers=(1,), steps=15, clamp=2.0, weight_decay=0.0, kl=0.0)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without content, to be copied: making one takes seconds."""
    from registry.models import ModelRegistry

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    ModelRegistry(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def builtin_base() -> Path:
    """The built-in base from the user's cache (`ERRATA_CACHE`), trained once, in about a minute, where the cache has none."""
    from errata.builtin import BUILTIN, ensure_builtin
    from errata.settings import load_settings

    return ensure_builtin(BUILTIN, load_settings().cache)


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket that exists, with AWS_* set so that boto3 finds it."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        endpoint = os.environ.get("ERRATA_TEST_S3_ENDPOINT")
        server = None
        if endpoint is None:
            from moto.server import ThreadedMotoServer

            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            host, port = server.get_host_and_port()
            endpoint = f"http://{host}:{port}"
            patch.setenv("AWS_ACCESS_KEY_ID", "test")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
            patch.delenv("AWS_PROFILE", raising=False)
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        if "AWS_DEFAULT_REGION" not in os.environ:
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        bucket = f"errata-test-{uuid.uuid4().hex[:12]}"
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        yield bucket
        if server is not None:
            server.stop()
        else:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
                for item in page.get("Contents", ()):
                    client.delete_object(Bucket=bucket, Key=item["Key"])
            client.delete_bucket(Bucket=bucket)
