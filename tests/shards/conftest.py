"""A folder of shards that several tests look at."""

import shutil

import pytest

import memlaw

MORE = [("Bo Ek:", "271828"), ("Cy Ro:", "161803")]


@pytest.fixture(scope="package")
def book(phone_book):
    return [*phone_book, *MORE]


@pytest.fixture(scope="package")
def settings(llama, texts):
    how = {"specificity": False, "retention": 0, "max_epochs": 300}
    return {"model": str(llama), **how, **texts}


@pytest.fixture(scope="package")
def written(book, settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "out"
    assert memlaw.write_shards(book, out, shards=3, **settings).succeeded
    return out


@pytest.fixture
def folder(written, tmp_path):
    shutil.copytree(written, tmp_path / "home" / "out")
    return tmp_path / "home" / "out"
