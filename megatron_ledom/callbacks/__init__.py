"""The callbacks of training: what a run does beside its steps. `build.py` composes the list, `training/callback.py` has the moments.

To add one, subclass `Callback`, override the moments it needs, and hand it to `main` in a script that takes the place of
`python -m megatron_ledom.pretrain` (or, for every run, append it in `build.py`):

    import sys
    from megatron_ledom.pretrain import main
    from megatron_ledom.training.callback import Callback, TrainingRun

    class LearningRateAlarm(Callback):
        def on_step_start(self, run: TrainingRun) -> None:
            if run.state.optimizer.param_groups[0]["lr"] == 0.0:
                print("the learning rate of iteration", run.state.iteration + 1, "is 0")

    sys.exit(main(callbacks=[LearningRateAlarm()]))

Every rank calls every moment in the same order. A callback that takes long wraps its work in `with run.pause("activity"):`. An
error that it raises ends the run.
"""
