"""Names, close matches and published facts."""

from __future__ import annotations

import dataclasses

import pytest

from effvit.backbones import backbone_info, create_backbone, create_classifier, list_backbones
from effvit.errors import ConfigError


def test_list_backbones_matches_a_pattern():
    assert list_backbones("efficientvit_m*") == [f"efficientvit_m{number}" for number in range(6)]
    assert list_backbones("nothing*") == []
    assert set(list_backbones("*_m4")) <= set(list_backbones())


def test_names_are_importable_from_the_package():
    import effvit

    assert effvit.create_backbone is create_backbone
    assert effvit.create_classifier is create_classifier
    assert effvit.list_backbones is list_backbones


@pytest.mark.parametrize("ask", [backbone_info, create_backbone, create_classifier])
def test_unknown_name_offers_close_matches(ask):
    with pytest.raises(ConfigError, match=r"no backbone 'eficientvit_m4'.*efficientvit_m4"):
        ask("eficientvit_m4")


def test_unknown_override_offers_close_matches():
    with pytest.raises(ConfigError, match=r"efficientvit_m0 has no option 'dens'.*'dense'"):
        create_backbone("efficientvit_m0", dens=True)


def test_class_count_must_be_positive():
    with pytest.raises(ConfigError, match="num_classes"):
        create_classifier("efficientvit_m0", num_classes=0)


def test_info_is_frozen_and_sourced():
    info = backbone_info("efficientvit_m5")
    assert (info.family, info.top1, info.top5, info.licence) == ("EfficientViT", 77.1, 93.4, "MIT")
    assert info.url.endswith("/v1.0/efficientvit_m5.pth")
    assert "README" in info.source
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.params = 0
