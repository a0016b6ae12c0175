"""What the scripts make of their arguments: the names of runs, and one sentence for each mistake."""

import importlib

import pytest

import run

NAMES = [line.split(": ") for line in """
gr-2: train_gr
gr-10: train_gr --dataset cifar10
er-100: train_gr --replay buffer --buffer-size 100
finetune-lr0.001-linear: train_gr --replay none --lr 0.001 --schedule linear
joint-batch_size64-tasks1: train_gr --replay all --tasks 1 --batch-size 64
gd-5-ipndm-analytic: train_gd --teacher-steps 5 --teacher-solver ipndm --first-step analytic
gd-2: train_gd --dataset fashion-mnist --unet fashion-mnist --image-size 32 --epochs 100 --batch-size 128 --lr 2e-4
gd-2: train_gd --lambda 0.75 --sample-steps 10 --schedule zero-snr --no-flip --tasks 5 --class-order random
gd-10: train_gd --dataset cifar10 --unet cifar10 --epochs 200 --batch-size 64 --sample-steps 20 --flip --lambda 0.75
gd-10-noflip: train_gd --dataset cifar10 --no-flip
gd-2-lam0.5-bf16-laptop: train_gd --scale laptop --lambda 0.5 --precision bf16 --restart --out x --device cpu
lwf: train_gd --distill current
gd-2-iterations5_3-bf16: train_gd --precision bf16 --iterations 5,3
gd-2-fp32: train_gd --precision fp32 --no-compile
gd-2-class_ordernatural-small: train_gd --scale small --class-order natural --tasks 5
gd-2-laptop: train_gd --scale laptop --tasks 3
gd-2-epochs20.0-laptop: train_gd --scale laptop --epochs 20
gd-2-flip: train_gd --flip
gd-2-tasks1-class_order0_1-2_7: train_gd --class-order 0,1|2,7 --tasks 1 --seed 69
jdcl: train_jdcl --dataset cifar10 --unet jdcl-cifar --image-size 32 --batch-size 256 --lr 2e-4 --local-iterations 50000
jdcl: train_jdcl --global-iterations 30000 --classifier-start 10000 --ema-decay 0.9999 --replay-per-class 1000 --flip
jdcl: train_jdcl --replay-steps 250 --replay-cap 2 --alpha 1e-3 --local-init scratch --teacher ema --kd-weighting sample
jdcl-small: train_jdcl --scale small --unet jdcl-laptop-rgb --image-size 16 --class-order natural --tasks 5
jdcl-tasks10: train_jdcl --dataset cifar100 --tasks 10
jdcl-labels0.008-labelled_only: train_jdcl --labels 0.008 --labelled-only
jdcl-local_iterations5_6: train_jdcl --local-iterations 5,6
jdcl-classifier_start80000-tasks2: train_jdcl --dataset cifar100 --tasks 2 --classifier-start 80000
classifier-joint: train_classifier --replay all --epochs 20
classifier-finetune-tasks2-epochs5.0: train_classifier --replay none --epochs 5 --tasks 2""".strip().splitlines()]


@pytest.mark.parametrize("name, command", NAMES)
def test_names_tell_what_departs_from_the_preset(name, command):
    script, *arguments = command.split()
    assert importlib.import_module(script).get_args(arguments).name == name


BAD = """
train_gd.py --dataset emnist
train_gd.py --lambda nan
train_gd.py --teacher-steps 1001
train_gd.py --teacher-steps 2 --distill noise
train_gd.py --teacher-steps 1000 --first-step analytic
train_gd.py --tasks 3
train_gd.py --epochs 1e300
train_gd.py --iterations 1,1,1,1,1,1
train_gd.py --iterations 5,0
train_gd.py --seed -1
train_gd.py --seed 99999999999999999999999
train_gd.py --save-every soon
train_gd.py --save-every 99999999999999
train_gd.py --re
train_gd.py --unet resnet
train_gd.py --unet cifar10
train_gd.py --image-size 30
train_gd.py --device cuda:99
train_gr.py --replay buffer
train_gr.py --buffer-size 100
train_gr.py --replay buffer --buffer-size 3
train_gr.py --replay buffer --tasks 1
train_gr.py --replay none --teacher-steps 2
train_gr.py --scale laptop --dataset shapes --init nowhere.pt --out run
train_gr.py --scale laptop --dataset shapes --out /proc/run
train_jdcl.py --replay none --no-kd
train_jdcl.py --replay none --local-init scratch
train_jdcl.py --one-stage --classifier-start 0
train_jdcl.py --one-stage --labels 0.5
train_jdcl.py --no-kd --kd-weighting group
train_jdcl.py --labelled-only
train_jdcl.py --labelled-batch 8
train_jdcl.py --labels 0.5 --labelled-only --labelled-batch 8
train_jdcl.py --labels 0.5 --batch-size 32
train_jdcl.py --batch-size 4
train_jdcl.py --class-order 0,1,2|3 --batch-size 3
train_jdcl.py --local-iterations 1,1,1,1,1,1
train_jdcl.py --class-order 0,1|2,3 --global-iterations 11000,11000
train_jdcl.py --global-iterations 20000,10000
train_jdcl.py --image-size 30
train_classifier.py --dataset fashion-mnist
train_classifier.py nowhere
train_classifier.py nowhere --replay all
train_classifier.py --replay none --steps 10
train_classifier.py --replay all --iterations 1,2,3,4,5,6
eval_fid.py
eval_fid.py run --train-resnet18 shapes
eval_fid.py run --n 1""".strip().splitlines()


@pytest.mark.parametrize("command", BAD)
def test_bad_arguments_end_with_a_sentence_and_code_2(script, main, tmp_path, command):
    name, *arguments = command.split()
    (script if "--re" in arguments else main)(name, *arguments, code=2)  # one of them as a person would
    assert not any(tmp_path.iterdir()), "no folder is made for a run that cannot start"


def test_a_run_name_is_a_single_folder_whatever_the_method_is_called():
    assert run.run_name("my/../own method-2", {"lam": 0.5}, "small") == "my_.._own_method-2-lam0.5-small"
    for length in ("epochs", [6.0, 2.0]), ["epochs", [6.0, 2.0]]:  # as parsed, and as config.json has it
        assert run.run_name("gd-2", {"length": length}, "paper") == "gd-2-epochs6.0_2.0"


@pytest.mark.parametrize("name", [*(f"train_{method}" for method in ("gr", "gd", "ewc", "jdcl", "classifier")),
                                  "eval_fid", "report"])
def test_help(capsys, name):
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(name).get_args(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {name}.py")
