# Each target makes the virtual environment by itself when it is absent; see scripts/python.sh.
PYTHON_OF = $$(scripts/python.sh)

# Files whose tests train nothing, or next to nothing.
FAST = $(addprefix tests/test_,$(addsuffix .py,captions cli config content fusion golden help keys locales losses metrics \
	muon out_of_memory pages placement sam scenery state subjects tokens weights workflows))

.PHONY: help demo test test-fast test-full-size test-transformers-4 test-oldest test-peft test-fleet torture lint format

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 24

demo:  ## the full pipeline on sample subjects; leaves outputs/demo/index.html
	rm -rf outputs/demo
	python=$(PYTHON_OF) && "$$python" -m far_train demo --out outputs/demo

# Files stay in their order: test_endurance counts what is alive, which test_fast_path's compiling would disturb.
test: lint  ## all tests but the full-size ones, a process on each of up to eight cores
	python=$(PYTHON_OF) && "$$python" -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-fast: lint  ## what most changes break first, in under a minute
	python=$(PYTHON_OF) && "$$python" -m pytest -q -n auto --maxprocesses 8 $(FAST)

test-full-size:  ## the model families at their real sizes with random weights (16 GB of memory)
	python=$(PYTHON_OF) && "$$python" -m pytest -m full_size tests/test_full_size.py

test-transformers-4:  ## the library's tests on the 4.x line of transformers
	python=$(PYTHON_OF) && path=$$(scripts/transformers4.sh) && PYTHONPATH="$$path" "$$python" -m pytest --ignore tests/host

test-oldest:  ## the library's tests on the oldest diffusers and transformers that it supports
	python=$(PYTHON_OF) && path=$$(scripts/other_versions.sh "transformers==4.50.3" "diffusers==0.35.0") && PYTHONPATH="$$path" "$$python" -m pytest --ignore tests/host

test-peft:  ## diffusers' own loader on the LoRA files that FaR exports; it needs peft, which the project doesn't
	python=$(PYTHON_OF) && path=$$(scripts/other_versions.sh --no-deps peft accelerate) && PYTHONPATH="$$path" "$$python" -m pytest tests/test_lora_files.py

test-fleet:  ## fleets on Ray, which the project doesn't need otherwise
	python=$(PYTHON_OF) && path=$$(scripts/other_versions.sh "ray[client]") && PYTHONPATH="$$path" "$$python" -m pytest tests/test_fleet_ray.py

torture:  ## the long forms: 1,000 mutated files and workflows, 200 kills, 50 runs in one host (an hour on two cores)
	python=$(PYTHON_OF) && path=$$(scripts/other_versions.sh "ray[client]") && PYTHONPATH="$$path" "$$python" -m pytest -m torture -s tests

lint:  ## check style
	python=$(PYTHON_OF) && "$$python" -m ruff check . && "$$python" -m ruff format --check .

format:  ## bring the code to the project's format
	python=$(PYTHON_OF) && "$$python" -m ruff check --fix . && "$$python" -m ruff format .
