# For those who build with Docker or Buildah; `cargo xtask image` needs neither and writes the
# same thing.
#   docker build -t signet .
FROM rust:1-trixie AS build
RUN apt-get update && apt-get install --yes --no-install-recommends git sudo
WORKDIR /src
COPY . .
RUN cargo xtask image --output /image.tar \
 && mkdir /layout /root-of-image \
 && tar -xf /image.tar -C /layout \
 && for layer in /layout/blobs/sha256/*; do \
      if gzip -t "$layer" 2>/dev/null; then tar -xzf "$layer" -C /root-of-image; fi; \
    done

FROM scratch
COPY --from=build /root-of-image/ /
ENV PATH=/usr/bin
ENTRYPOINT ["/usr/bin/signet"]
