"""The card of a published model, its README on the Hugging Face Hub."""
from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from timm.models import get_pretrained_cfg, is_model_in_modules

from .names import option
from .public_args import is_place
from .results import RunResult
from .trained import TrainedModel

__all__ = ['first_model', 'hub_dataset', 'model_card']

# Hub id and name of data sets known here, by the last part of timm's data set name.
_HUB_DATASETS = {'cifar100': ('uoft-cs/cifar100', 'CIFAR-100'), 'cifar10': ('uoft-cs/cifar10', 'CIFAR-10')}

_IMPORT = '''
import timm_dense2net  # registers the model in timm
'''

_RES2NET = '''\
@article{gao2019res2net,
  title = {Res2Net: A New Multi-scale Backbone Architecture},
  author = {Gao, Shang-Hua and Cheng, Ming-Ming and Zhao, Kai and Zhang, Xin-Yu and Yang, Ming-Hsuan and Torr, Philip},
  journal = {arXiv:1904.01169},
  year = {2019}
}
'''

_DENSE2NET = '''\
@misc{starliper_dense2net,
  title = {Dense2Net: A Hybrid DenseNet/Res2Net Architecture},
  author = {Starliper, Nathan and Songkakul, Tanner}
}
@inproceedings{huang2017densely,
  title = {Densely Connected Convolutional Networks},
  author = {Huang, Gao and Liu, Zhuang and van der Maaten, Laurens and Weinberger, Kilian Q.},
  booktitle = {CVPR},
  year = {2017}
}
'''


def first_model(trained: TrainedModel) -> str:
    """The model's name with the tag of the weights that it was trained on."""
    return json.loads(trained.metadata['args'])['model']


def hub_dataset(dataset: str) -> str:
    """timm's name of a data set: of one that is known here and was in a folder, that on the Hub."""
    name = dataset.rpartition('/')[2]
    known = name in _HUB_DATASETS and not dataset.startswith('hfds/')
    return f'hfds/{_HUB_DATASETS[name][0]}' if known else dataset


def model_card(
        repo_id: str,
        result: RunResult,
        trained: TrainedModel,
        args: Mapping[str, Any],
        dataset: str,
        processes: int,
        files: Collection[str],
) -> str:
    """Markdown with the Hub's YAML front matter.

    Args:
        repo_id: OWNER/NAME of the repository.
        result: What the run came to.
        trained: The model as it was loaded from the run's weights.
        args: The run's arguments.
        dataset: Name of the data set in its recipe.
        processes: Number of processes that trained it together.
        files: Names of the repository's other files.
    """
    name = repo_id.partition('/')[2]
    licence = get_pretrained_cfg(first_model(trained)).license or 'apache-2.0'
    dataset_name = _dataset_names(result)[1]
    start, missing_start = _start(args)
    teacher, missing_teacher = _teacher(args)
    left_out = _left_out([_data_option(dataset), missing_start, missing_teacher])
    # Batch size and batch statistics are those of a process.
    command = 'python' if processes == 1 else f'torchrun --nproc-per-node {processes}'
    epoch = 'the epoch that was best on held-out images' if result.hold_out else 'the last epoch'
    size = ' x '.join(str(side) for side in trained.data_config['input_size'])
    weights = 'EMA of the weights' if result.ema else 'weights'
    return f'''---
{_front_matter(name, licence, result, trained).to_yaml()}
---
# {name}

{_architecture(trained)}, an image classifier for [timm](https://github.com/huggingface/pytorch-image-models),
trained on {dataset_name} with `timm_dense2net`.

| | |
| --- | --- |
| Parameters | {result.params / 1e6:.2f} M |
| Input | {size} |
| Classes | {trained.model.num_classes} |
| Top-1 / top-5 on the test split | {result.top1:.2f} % / {result.top5:.2f} % |
| Recipe | {_recipe(result)} |
| Trained | {result.epochs_trained} epochs from {start}{teacher}, seed {result.seed}; {weights} of {epoch} |
| Hardware | {result.hardware}, {result.wall_time / 3600:.2f} h |
| Libraries | {result.versions} |

## Use

```bash
{'pip install .    # in a checkout of timm_dense2net' if _needs_package(trained) else 'pip install timm'}
```

```python
import timm
import torch
from PIL import Image
{_IMPORT if _needs_package(trained) else ''}
model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

image = Image.open('image.png').convert('RGB')
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(dim=1)[0]
names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for probability, index in zip(*probabilities.topk(min(5, model.num_classes))):
    print(f'{{names[index]}}: {{100 * probability:.1f}} %')
```

## Training

All arguments are in `recipe.yaml` (in a checkout of timm_dense2net `{command} train_cifar.py --recipe recipe.yaml`
trains it again{left_out}), the figures of each epoch in `summary.csv`.
{_pictures(files)}
## Licence

Code and weights: {licence}. The training data has terms of its own.
{_citation(trained)}'''


def _is_in(trained: TrainedModel, *modules: str) -> bool:
    return is_model_in_modules(trained.model.pretrained_cfg['architecture'], list(modules))


def _needs_package(trained: TrainedModel) -> bool:
    return _is_in(trained, 'dense2net', 'resnet_cifar') or trained.conversion is not None


def _architecture(trained: TrainedModel) -> str:
    conversion = trained.conversion
    name = f'`{trained.metadata["model"]}`'
    if conversion is None:
        return name
    return f"{name} with Res2Net's hierarchy (scale {conversion['scale']}) in the place of its 3x3 convolutions"


def _citation(trained: TrainedModel) -> str:
    """Of what the model has from this package: other timm models are described where timm is."""
    is_dense2net = _is_in(trained, 'dense2net')
    has_hierarchy = is_dense2net or trained.conversion is not None or 'res2ne' in trained.metadata['model']
    works = (_DENSE2NET if is_dense2net else '') + (_RES2NET if has_hierarchy else '')
    return f'\n## Citation\n\n```bibtex\n{works}```\n' if works else ''


def _dataset_names(result: RunResult) -> tuple[str, str]:
    """Id on the Hub and name of the data set, of one that is not known here its own for both."""
    return _HUB_DATASETS.get(result.dataset, (result.dataset, result.dataset))


def _front_matter(name: str, licence: str, result: RunResult, trained: TrainedModel) -> ModelCardData:
    dataset_id, dataset_name = _dataset_names(result)
    shared = dict(
        task_type='image-classification', dataset_type=dataset_id, dataset_name=dataset_name, dataset_split='test')
    return ModelCardData(
        license=licence,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['timm', 'image-classification', *(['dense2net'] if _is_in(trained, 'dense2net') else [])],
        datasets=[dataset_id] if result.dataset in _HUB_DATASETS else None,
        model_name=name,
        eval_results=[
            EvalResult(metric_type='accuracy', metric_name=metric, metric_value=value, **shared)
            for metric, value in (('Top-1 accuracy (%)', result.top1), ('Top-5 accuracy (%)', result.top5))],
    )


def _left_out(clauses: Iterable[str]) -> str:
    """What the recipe cannot say, added to a sentence."""
    clauses = [clause for clause in clauses if clause]
    return f'; {", ".join(clauses)}' if clauses else ''


def _data_option(dataset: str) -> str:
    """The option that says where the data is; empty where the data set's name does."""
    if dataset == 'digits' or dataset.startswith('hfds/'):
        return ''
    # Of data in a folder the name alone is told, of all others timm's name, which has a kind before a slash.
    return f'`{"--data-dir" if "/" in dataset else "--dataset"}` says where the data is'


def _start(args: Mapping[str, Any]) -> tuple[str, str]:
    """What a run started from, and what its recipe cannot say of it."""
    for name in ('initial_checkpoint', 'pretrained_path'):
        if args.get(name) and not is_place(name, args[name]):
            return f'the packaged weights `{args[name]}`', ''
        if args.get(name):
            return 'weights of another run', f'`{option(name)}` says which weights it starts from'
    if not args.get('pretrained'):
        return 'random weights', ''
    if is_place('model', args['model']):
        return 'weights of another run', '`--pretrained-path` says which weights it starts from'
    return f'the weights of `{args["model"]}`' if args['model'].startswith('hf-hub:') else 'pretrained weights', ''


def _teacher(args: Mapping[str, Any]) -> tuple[str, str]:
    """The same of its teacher."""
    for name in ('kd_pretrained_path', 'kd_model_name'):
        if args.get(name) and is_place(name, args[name]):
            return ', with a teacher from another run', f'`{option(name)}` says which teacher it has'
    return (f', with `{args["kd_model_name"]}` as its teacher', '') if args.get('kd_model_name') else ('', '')


def _recipe(result: RunResult) -> str:
    recipe = f'`{result.recipe}`' if result.recipe else 'own'
    return f'{recipe} with `{result.overrides}`' if result.overrides else recipe


def _pictures(files: Collection[str]) -> str:
    titles = {
        'curves.png': 'Accuracy and loss, training and validation',
        'confusion_matrix.png': 'Confusion matrix',
    }
    return ''.join(f'\n![{title}]({name})\n' for name, title in titles.items() if name in files)
