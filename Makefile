# Every target sets up what it needs by itself (scripts/setup) and runs from a fresh clone.
CARGO ?= cargo
ARGS ?=
PROFILE ?= release

.PHONY: demo test check bench bless setup

# The main job: real Services proxied in network namespaces of their own.
#   make demo ARGS="--mode all --json"
demo:
	@scripts/setup build
	$(CARGO) run --quiet --profile $(PROFILE) --example demo -- $(ARGS)

# Everything: unit, property, golden and real-kernel tests.
test:
	@scripts/setup build test
	scripts/test $(ARGS)

# Format, lints, documentation, licences.
check:
	@scripts/setup build test check
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --all-features -- -D warnings
	$(CARGO) clippy -p proxier --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --all-features --no-deps --quiet
	$(CARGO) deny --all-features check bans licenses sources

# Every mode beside its peers and the floor, from 100 to 45,000 Services (docs/benchmarks.md).
#   make bench ARGS="--report docs/bench"
bench:
	@scripts/setup build test
	$(CARGO) run --quiet --release --example bench -- --report target/bench $(ARGS)

# Write the golden plans anew; read the diff before you commit it.
bless:
	BLESS=1 $(CARGO) test --workspace --all-features --test golden
