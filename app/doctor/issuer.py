"""Who signs the JWTs that stand for keys: whether their keys can be had."""

from collections.abc import Sequence

from app.doctor.lines import Line, fault, ok
from app.kernel.errors import IssuerUnavailable
from app.wiring import House


async def look(house: House, _: str) -> Sequence[Line]:
    """Nothing, where no JWT is taken."""
    if house.issuer is None:
        return []
    try:
        keys = await house.issuer.keys()
    except IssuerUnavailable as error:
        return [fault("jwt.keys", error.message, "see JWT_JWKS and JWT_ISSUER: without keys no JWT is taken")]
    return [ok("jwt.keys", f"{len(keys)} keys of {house.settings.jwt_issuer} sign: {', '.join(keys)}")]
