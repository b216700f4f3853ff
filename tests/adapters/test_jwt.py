"""A JWT is believed only if its issuer signed it for us and it is not over; and no token makes us hammer the issuer."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization

from app.adapters.asking import Patience
from app.adapters.issuer import JwtIssuer
from app.adapters.jwks import Keys, Trust
from app.kernel.errors import InvalidApiKey, IssuerUnavailable
from app.kernel.security import subject_hash
from tests.issuers import AUDIENCE, ISSUER, IssuerServer, Signer, served, signer

RSA, EC, OTHER = signer("rsa-1"), signer("ec-1", "EC"), signer("other")
QUICK = Patience(connect_seconds=5, read_seconds=5, deadline_seconds=10, retries=0, at_once=1)


def b64(text: bytes) -> str:
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def hand_made(head: Any, claims: Any, sign: Callable[[bytes], bytes]) -> str:
    """A token that no library would make."""
    first = ".".join(b64(each if isinstance(each, bytes) else json.dumps(each).encode()) for each in (head, claims))
    return f"{first}.{b64(sign(first.encode()))}"


def claims(**other: Any) -> dict[str, Any]:
    return {"iss": ISSUER, "aud": AUDIENCE, "sub": "user-1", "exp": int(time.time()) + 600} | other


def rs256(key: Signer = RSA) -> Callable[[bytes], bytes]:
    return lambda text: jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256).sign(text, key.private)


def by_public_key(text: bytes) -> bytes:
    """The old confusion: the public key as the secret of an HMAC."""
    pem = RSA.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hmac.new(pem, text, hashlib.sha256).digest()


def bad_tokens() -> dict[str, str]:
    """Each is a good token but for one thing."""
    good, now = RSA.token(), int(time.time())
    head, payload, signature = good.split(".")
    other_payload = RSA.token(sub="user-2").split(".")[1]
    raw = json.dumps(claims()).encode()
    return {
        "of another key by that name": OTHER.token(head={"kid": RSA.kid}),
        "of a key that there is not": OTHER.token(),
        "without a key's name, where there are two of its kind": RSA.token(head={"kid": None}),
        "named as a key of another kind": EC.token(head={"kid": RSA.kid}),
        "none": hand_made({"alg": "none", "kid": RSA.kid}, claims(), lambda _: b"x"),
        "None, in other letters": hand_made({"alg": "nOnE", "kid": RSA.kid}, claims(), lambda _: b"x"),
        "HS256 by the public key": hand_made({"alg": "HS256", "kid": RSA.kid}, claims(), by_public_key),
        "RS256 that is an HMAC": hand_made({"alg": "RS256", "kid": RSA.kid}, claims(), by_public_key),
        "RS512": hand_made({"alg": "RS512", "kid": RSA.kid}, claims(), rs256()),
        "PS256": hand_made({"alg": "PS256", "kid": RSA.kid}, claims(), rs256()),
        "EdDSA": hand_made({"alg": "EdDSA", "kid": RSA.kid}, claims(), rs256()),
        "ES256 of a key for RS256": hand_made({"alg": "ES256", "kid": RSA.kid}, claims(), rs256()),
        "no algorithm": hand_made({"kid": RSA.kid}, claims(), rs256()),
        "an algorithm that is a list": hand_made({"alg": ["RS256"], "kid": RSA.kid}, claims(), rs256()),
        "a key of its own": hand_made({"alg": "RS256", "jwk": OTHER.public}, claims(), rs256(OTHER)),
        "an address of keys": hand_made(
            {"alg": "RS256", "kid": "x", "jku": "http://127.0.0.1:1/"}, claims(), rs256(OTHER)
        ),
        "what we do not understand and must": hand_made(
            {"alg": "RS256", "kid": RSA.kid, "crit": ["exp"]}, claims(), rs256()
        ),
        "unencoded": hand_made({"alg": "RS256", "kid": RSA.kid, "b64": False, "crit": ["b64"]}, b"", rs256()),
        "a logout": RSA.token(head={"typ": "logout+jwt"}),
        "a key's name that is a number": hand_made({"alg": "RS256", "kid": 1}, claims(), rs256()),
        "a key's name that is long": hand_made({"alg": "RS256", "kid": "k" * 500}, claims(), rs256()),
        "a header that is a list": hand_made([], claims(), rs256()),
        "a header that is no JSON": hand_made(b'{"alg"', claims(), rs256()),
        "another's claims": f"{head}.{other_payload}.{signature}",
        "half a signature": f"{head}.{payload}.{signature[: len(signature) // 2]}",
        "no base64": f"{head}.{payload}.A",
        "over": RSA.token(exp=now - 1),
        "never over": RSA.token(exp=None),
        "over at a text": RSA.token(exp=str(now + 600)),
        "over at true": RSA.token(exp=True),
        "over at null": hand_made({"alg": "RS256", "kid": RSA.kid}, claims(exp=None), rs256()),
        "over at infinity": hand_made(
            {"alg": "RS256", "kid": RSA.kid}, raw.replace(str(claims()["exp"]).encode(), b"1e999"), rs256()
        ),
        "over at NaN": hand_made(
            {"alg": "RS256", "kid": RSA.kid}, raw.replace(str(claims()["exp"]).encode(), b"NaN"), rs256()
        ),
        "not yet": RSA.token(nbf=now + 600),
        "not yet, at a text": RSA.token(nbf="soon"),
        "made in the future": RSA.token(iat=now + 600),
        "of another issuer": RSA.token(iss="https://elsewhere.example"),
        "of an issuer that begins so": RSA.token(iss=ISSUER + "/"),
        "of no issuer": RSA.token(iss=None),
        "of a list of issuers": RSA.token(iss=[ISSUER]),
        "for another": RSA.token(aud="another"),
        "for others": RSA.token(aud=["another", "third"]),
        "for nobody": RSA.token(aud=None),
        "for an empty list": RSA.token(aud=[]),
        "for a number": RSA.token(aud=1),
        "for an application that an ID token names": RSA.token(aud=None, client_id=AUDIENCE, token_use="id"),
        "of nobody": RSA.token(sub=None),
        "of an empty name": RSA.token(sub=""),
        "of a number": RSA.token(sub=7),
        "of a name that is long": RSA.token(sub="s" * 256),
        "of a name with a line in it": RSA.token(sub="a\nb"),
        "of half a character": RSA.token(sub="\ud800"),
        "claims that are a list": hand_made({"alg": "RS256", "kid": RSA.kid}, [], rs256()),
        "claims that are deep": hand_made(
            {"alg": "RS256", "kid": RSA.kid}, b'{"a":' + b"[" * 3000 + b"]" * 3000 + b"}", rs256()
        ),
    }


class Seconds:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def server() -> AsyncIterator[IssuerServer]:
    async with served(RSA, EC, signer("rsa-2")) as server:
        yield server


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


def issuer_of(source: str, clock: Seconds, **trust: Any) -> JwtIssuer:
    keys = Keys(source, trust=Trust(**trust), patience=QUICK, monotonic=clock)
    return JwtIssuer(ISSUER, [AUDIENCE, "second"], keys)


async def is_taken(issuer: JwtIssuer, token: str) -> bool:
    """Refused is whatever is not taken with the words of an unknown key."""
    told = None
    try:
        await issuer.subject(token)
    except InvalidApiKey as refused:
        told = refused.message
    assert told in (None, InvalidApiKey().message)
    return told is None


async def test_a_token_is_its_subjects_whatever_signed_it(server: IssuerServer, clock: Seconds) -> None:
    issuer, now = issuer_of(server.url, clock), int(time.time())
    good = [
        RSA.token(), EC.token(), RSA.token(head={"typ": "JWT"}), RSA.token(head={"typ": "at+JWT"}), EC.token(head={"kid": None}),
        RSA.token(aud=["another", "second"]), RSA.token(nbf=now - 5, iat=now - 5), RSA.token(nbf=now + 20), RSA.token(exp=now + 60.5),
        RSA.token(aud=None, client_id=AUDIENCE, token_use="access"), RSA.token(email="a@b.example", groups=[1, {}]),
    ]  # fmt: skip
    assert {await issuer.subject(token) for token in good} == {subject_hash(ISSUER, "user-1")}
    assert await issuer.subject(RSA.token(sub="user-2")) == subject_hash(ISSUER, "user-2")
    await issuer.close()
    assert server.asked == 1


async def test_whatever_is_wrong_with_a_token_it_is_refused_alike(server: IssuerServer, clock: Seconds) -> None:
    issuer = issuer_of(server.url, clock)
    assert await is_taken(issuer, RSA.token())
    assert {what for what, token in bad_tokens().items() if await is_taken(issuer, token)} == set()
    await issuer.close()


async def test_one_character_more_less_or_other_is_refused(server: IssuerServer, clock: Seconds) -> None:
    issuer, token = issuer_of(server.url, clock), EC.token()
    signed = token.rpartition(".")[0]
    other = [token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :] for at in range(0, len(signed), 7)]
    assert [each for each in other if await is_taken(issuer, each)] == []
    await issuer.close()


async def test_another_claim_may_say_whose_it_is(server: IssuerServer, clock: Seconds) -> None:
    issuer = JwtIssuer(ISSUER, [AUDIENCE], Keys(server.url, patience=QUICK), subject_claim="https://example.com/org")
    of_org: Any = {"https://example.com/org": "org-9"}
    assert await issuer.subject(RSA.token(**of_org)) == subject_hash(ISSUER, "org-9")
    assert await issuer.subject(RSA.token(sub="user-2", **of_org)) == subject_hash(ISSUER, "org-9")
    assert not await is_taken(issuer, RSA.token())
    await issuer.close()


def test_two_subjects_are_two_however_they_are_cut() -> None:
    named = [("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("a", "b\x00c")]
    assert len({subject_hash(*each) for each in named}) == len(named)


async def test_keys_that_are_none_are_not_used(clock: Seconds) -> None:
    private = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(OTHER.private)) | {"kid": "private"}
    unfit = [
        {"kty": "oct", "kid": "shared", "k": b64(b"s" * 64), "alg": "HS256"}, private, signer("weak", "weak").public,
        OTHER.public | {"use": "enc"}, OTHER.public | {"alg": "RS512"}, OTHER.public | {"key_ops": ["encrypt"]},
        OTHER.public | {"key_ops": 1}, OTHER.public | {"n": "!!"}, EC.public | {"crv": "P-384"}, EC.public | {"x": "AA"},
        {"kty": "RSA"}, {}, {"kty": ["RSA"]},
    ]  # fmt: skip
    async with served(RSA) as server:
        server.keys = [*unfit, RSA.public]
        issuer = issuer_of(server.url, clock)
        assert await issuer.keys() == ["rsa-1 (RS256)"]
        forged = hand_made(
            {"alg": "HS256", "kid": "shared"}, claims(), lambda text: hmac.new(b"s" * 64, text, "sha256").digest()
        )
        weak = hand_made({"alg": "RS256", "kid": "weak"}, claims(), rs256(signer("weak", "weak")))
        tokens = [OTHER.token(head={"kid": "private"}), weak, OTHER.token(), forged]
        assert [token for token in tokens if await is_taken(issuer, token)] == []
        server.keys = unfit
        with pytest.raises(IssuerUnavailable, match="of 13 there"):
            await issuer.keys()
        await issuer.close()


@pytest.mark.parametrize(
    ("raw", "status"), [(b"", 200), (b"[]", 200), (b'{"keys": {}}', 200), (b'{"keys": [1]}', 200), (b"\xff", 200), (b"[" * 5000, 200),
                        (b" " * 300_000, 200), (b"{}", 404), (b"{}", 500), (b"", 302)],
)  # fmt: skip
async def test_an_issuer_that_answers_rubbish_is_away(
    server: IssuerServer, clock: Seconds, raw: bytes, status: int
) -> None:
    """Also one that sends us elsewhere: nobody is followed."""
    server.raw, server.status = raw, status
    issuer = issuer_of(server.url, clock)
    with pytest.raises(IssuerUnavailable) as refused:
        await issuer.subject(RSA.token())
    assert refused.value.retry_after_seconds
    server.raw, server.status = None, 200
    assert await is_taken(issuer, RSA.token())
    await issuer.close()


async def test_a_new_key_is_learnt_when_a_token_names_it_and_an_old_one_forgotten(clock: Seconds) -> None:
    async with served(RSA) as server:
        issuer, new = issuer_of(server.url, clock), signer("rsa-2")
        assert await is_taken(issuer, RSA.token())
        server.keys = [new.public]
        assert await is_taken(issuer, new.token())
        assert not await is_taken(issuer, RSA.token())
        await issuer.close()


async def test_bad_tokens_do_not_have_the_issuer_asked_but_seldom(server: IssuerServer, clock: Seconds) -> None:
    issuer = issuer_of(server.url, clock, burst=3, pause_seconds=20)
    tokens = [OTHER.token(head={"kid": f"k{number}"}) for number in range(40)]
    assert not any(await asyncio.gather(*(is_taken(issuer, token) for token in tokens)))
    for token in tokens:
        assert not await is_taken(issuer, token)
    assert server.asked == 3
    for _ in range(5):
        clock.now += 10
        assert not any([await is_taken(issuer, token) for token in tokens])
    assert server.asked == 5
    for token in bad_tokens().values():  # what is not for us, or over, asks nobody
        await is_taken(issuer, token)
    assert server.asked == 5
    assert await is_taken(issuer, RSA.token())
    await issuer.close()


async def test_calls_of_one_moment_wait_for_one_question(server: IssuerServer, clock: Seconds) -> None:
    issuer = issuer_of(server.url, clock)
    taken = await asyncio.gather(*(is_taken(issuer, RSA.token(sub=f"user-{n}")) for n in range(30)))
    assert all(taken)
    assert server.asked == 1
    await issuer.close()


async def test_while_the_issuer_is_away_the_known_keys_hold_for_an_hour(server: IssuerServer, clock: Seconds) -> None:
    issuer = issuer_of(server.url, clock)
    assert await is_taken(issuer, RSA.token())
    await server.die()
    for _ in range(5):
        clock.now += 700
        assert await is_taken(issuer, RSA.token())
        assert not await is_taken(issuer, OTHER.token())
    clock.now += 200
    with pytest.raises(IssuerUnavailable):
        await issuer.subject(RSA.token())
    await server.begin(int(server.url.rpartition(":")[2].partition("/")[0]))
    clock.now += 60
    assert await is_taken(issuer, RSA.token())
    await issuer.close()


async def test_an_issuer_that_stalls_keeps_nobody_with_a_known_key_waiting(
    server: IssuerServer, clock: Seconds
) -> None:
    issuer = issuer_of(server.url, clock)
    assert await is_taken(issuer, RSA.token())
    server.stalls = True
    clock.now += 301
    waiting = asyncio.create_task(is_taken(issuer, OTHER.token()))
    for _ in range(20):
        assert await is_taken(issuer, RSA.token())
    assert not waiting.done()
    server.stalls = False
    assert not await waiting
    assert server.asked == 2
    await issuer.close()


async def test_keys_may_stand_in_a_file_that_is_replaced(tmp_path: Path, clock: Seconds) -> None:
    file, new = tmp_path / "jwks.json", signer("rsa-2")
    issuer = issuer_of(str(file), clock, burst=10)
    with pytest.raises(IssuerUnavailable):
        await issuer.subject(RSA.token())
    file.write_text(json.dumps({"keys": [RSA.public]}))
    assert await is_taken(issuer, RSA.token())
    file.write_text(json.dumps({"keys": [new.public]}))
    assert await is_taken(issuer, new.token())
    assert not await is_taken(issuer, RSA.token())
    file.unlink()
    with pytest.raises(IssuerUnavailable, match="cannot be read"):
        await issuer.keys()
    await issuer.close()
