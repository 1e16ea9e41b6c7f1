# The program in an image of its own: one static binary, no shell, not root. `make up` builds it.
# A bump of Go is a change of this line and of go.mod; Debian's release and the digest pin the rest.

FROM --platform=$BUILDPLATFORM golang:1.26.8-bookworm AS build
ARG TARGETOS
ARG TARGETARCH
WORKDIR /src
# The modules come first: a change of the code does not fetch them again.
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags="-s -w -X main.release=$(sh dev/scripts/version.sh)" -o /out/event-ingestion .

FROM gcr.io/distroless/static-debian13:nonroot@sha256:e2e927ec666bae08560abb3c55d0659eceabb657f56b6782ab500a9fc7f555e3
COPY --from=build /out/event-ingestion /event-ingestion
COPY --from=build /src/deploy/LICENSES.txt /LICENSES.txt
USER 65532:65532
EXPOSE 8080 6060
# There is no shell and no wget: the binary asks its own /ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["/event-ingestion", "healthcheck"]
ENTRYPOINT ["/event-ingestion"]
