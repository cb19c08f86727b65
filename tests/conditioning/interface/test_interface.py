"""Tests that all conditioners, readers and tokenizers have the members of their interfaces."""

import inspect

import pytest
import torch
from torch import nn

from conditioning import Unconditional, clip_tokenizer
from conditioning.classes.class_conditioner import ClassConditioner
from conditioning.conditioners import ConditionerConfig, build_conditioner
from conditioning.hints.hints import HINTS, SpatialConfig
from conditioning.interface.conditioner import Conditioner
from conditioning.interface.input_reader import Reader
from conditioning.interface.tokens import PromptTokenizer
from conditioning.layouts.layout_tokenizer import LayoutTokenizer
from conditioning.readers.combined import CombinedConditioner
from conditioning.readers.frame import FrameConfig, FrameReader
from conditioning.readers.spatial import SpatialReader
from conditioning.text.two_encoders import SecondEncoderConfig
from tests.helpers.models.small_encoders import CAPTIONS, SCRATCH, build_scratch

MEMBERS = {
    protocol: {name for name in (*vars(protocol), *protocol.__annotations__) if not name.startswith("_")}
    for protocol in (Conditioner, Reader, PromptTokenizer)
}


def two_encoders() -> nn.Module:
    second = SecondEncoderConfig(kind="scratch", scratch=SCRATCH)
    return build_conditioner(ConditionerConfig(kind="scratch", scratch=SCRATCH, second=second), CAPTIONS)


CONDITIONERS = {
    "text": build_scratch,
    "two encoders": two_encoders,
    "classes": lambda: ClassConditioner(torch.zeros(3, 4), 2),
    "unconditional": Unconditional,
    "combined": lambda: CombinedConditioner(build_scratch(), {"frame": FrameReader(FrameConfig(width=2))}),
}


def missing(instance: object, protocol: type) -> list[str]:
    return [name for name in sorted(MEMBERS[protocol]) if not hasattr(instance, name)]


@pytest.mark.parametrize("kind", CONDITIONERS)
def test_conditioners_have_all_members_of_the_interface(kind):
    conditioner = CONDITIONERS[kind]()
    assert isinstance(conditioner, nn.Module) and missing(conditioner, Conditioner) == []
    assert missing(conditioner.prompts, Conditioner) == []
    conditioner.bind_encoder(lambda images: images)  # has no effect without a reader of images


@pytest.mark.parametrize("kind", HINTS)
def test_readers_have_all_members_of_the_interface(kind):
    for reader in (SpatialReader(SpatialConfig(kind=kind, downsampling=4)), FrameReader(FrameConfig())):
        assert isinstance(reader, nn.Module) and missing(reader, Reader) == [] and reader.open_files() == []


def test_tokenizers_have_all_members_of_the_interface():
    for tokenizer in (clip_tokenizer(), LayoutTokenizer(26, 5)):
        assert missing(tokenizer, PromptTokenizer) == []


def test_every_member_of_the_interfaces_has_a_docstring():
    for protocol in MEMBERS:
        for name, member in vars(protocol).items():
            if isinstance(member, property) or inspect.isfunction(member) and not name.startswith("_"):
                assert inspect.getdoc(member), f"{protocol.__name__}.{name}"
