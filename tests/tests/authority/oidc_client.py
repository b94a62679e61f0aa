"""Verifies the token on standard input as a relying party would: by OIDC discovery, with PyJWT.

Arguments: issuer, file of roots, audience. Prints the claims, or the kind of refusal.
"""

import json
import ssl
import sys
import urllib.request

import jwt

issuer, roots, audience = sys.argv[1:]
token = sys.stdin.read().strip()
tls = ssl.create_default_context(cafile=roots)

with urllib.request.urlopen(issuer + "/.well-known/openid-configuration", context=tls) as answer:
    configuration = json.load(answer)
if configuration["issuer"] != issuer:
    sys.exit("the issuer in the document is another one")
try:
    key = jwt.PyJWKClient(configuration["jwks_uri"], ssl_context=tls).get_signing_key_from_jwt(token)
    claims = jwt.decode(
        token,
        key,
        algorithms=configuration["id_token_signing_alg_values_supported"],
        audience=audience,
        issuer=issuer,
        options={"require": ["exp", "iat", "iss", "aud", "sub"]},
    )
except jwt.PyJWTError as error:
    print(json.dumps({"refused": type(error).__name__}))
else:
    print(json.dumps({"claims": claims}))
