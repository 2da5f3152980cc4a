"""A server on loopback that speaks the Hugging Face Hub's HTTP calls for model repositories, and can be made to fail.

Spoken: repository creation and information, metadata validation, preupload, LFS batch, upload and verification,
commit, paths-info, and resolve by HEAD and GET with ETag, redirect and ranges. Answers and status codes follow
https://huggingface.co/docs/hub/api and the Git LFS batch API.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = 'hf_writer'


@dataclass
class Repo:
    """One branch of a repository: its commits, oldest first, as id and path to content."""
    private: bool = False
    commits: list = field(default_factory=list)

    @property
    def head(self):
        return self.commits[-1] if self.commits else ('0' * 40, {})


@dataclass
class Fault:
    """What is done to requests of a method whose path matches, and how many times."""
    method: str
    path: str
    action: str
    value: object = None
    times: int = 1_000_000


class HubServer(ThreadingHTTPServer):
    """The server; `repos`, `objects` (LFS content by SHA-256), `faults` and `log` are the test's to see and set."""
    daemon_threads = True

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_address[1]}'
        # The Hub's content lies on another host, to which the client sends no token.
        self.cdn_url = f'http://localhost:{self.server_address[1]}/cdn'
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        self.repos, self.objects, self.faults, self.log = {}, {}, [], []

    def fail(self, method, path, action, value=None, times=1_000_000):
        self.faults.append(Fault(method, path, action, value, times))

    def calls(self, method, path):
        return sum(called == method and re.search(path, where) is not None for called, where in self.log)


def git_oid(content):
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


def is_lfs(path):
    return path.endswith(('.safetensors', '.png', '.bin'))


def content_oid(path, content):
    return hashlib.sha256(content).hexdigest() if is_lfs(path) else git_oid(content)


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def handle_any(self):
        self.path = unquote(self.path)
        self.server.log.append((self.command, self.path))
        self.body = self._read_body()
        self.fault = None
        for fault in self.server.faults:
            if fault.times and fault.method == self.command and re.search(fault.path, self.path):
                fault.times -= 1
                self.fault = fault
                break
        if self.fault and self.fault.action == 'status':
            return self.answer(self.fault.value, b'', {'X-Error-Message': 'a fault of the test'})
        if self.fault and self.fault.action == 'drop':
            self.close_connection = True
            return None
        for pattern, method, handler in ROUTES:
            match = re.fullmatch(pattern, urlsplit(self.path).path)
            if match and self.command in method:
                return handler(self, **match.groupdict())
        return self.answer(501, f'{self.command} {self.path} is not spoken here'.encode())

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _read_body(self):
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def answer(self, status, content=b'', headers=None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        headers = {'Content-Type': 'application/json', 'Content-Length': str(len(content)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            if self.fault and self.fault.action == 'cut':
                self.wfile.write(content[:self.fault.value])
                self.close_connection = True
            else:
                self.wfile.write(content)

    @property
    def has_token(self):
        return self.headers.get('Authorization') == f'Bearer {TOKEN}'

    def denied(self):
        """Answers and says so where a write lacks the token."""
        if not self.has_token:
            self.answer(401, {'error': 'Invalid credentials'}, {'X-Error-Message': 'Invalid credentials'})
        return not self.has_token

    def find(self, repo):
        """The repository, or None with the Hub's answer given: 401 without a token, as it does not tell which exist."""
        found = self.server.repos.get(repo)
        if found and (self.has_token or not found.private):
            return found
        self.answer(404 if self.has_token else 401, {'error': 'Repository not found'}, {'X-Error-Code': 'RepoNotFound'})
        return None

    def create(self):
        if self.denied():
            return
        wanted = json.loads(self.body)
        repo = f'{wanted["organization"]}/{wanted["name"]}'
        if repo in self.server.repos:
            self.answer(409, {'error': 'You already created this model repo', 'url': f'{self.server.url}/{repo}'})
            return
        self.server.repos[repo] = Repo(private=wanted.get('visibility') == 'private')
        self.answer(200, {'url': f'{self.server.url}/{repo}', 'name': repo, 'id': repo})

    def info(self, repo, revision=None):
        found = self.find(repo)
        if found:
            oid, files = found.head
            self.answer(200, {'id': repo, 'sha': oid, 'siblings': [{'rfilename': name} for name in files]})

    def validate(self):
        match = re.match(r'---\n(.*?)\n---\n', json.loads(self.body)['content'], re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else None
        ok = isinstance(metadata, dict) and isinstance(metadata.get('license'), str)
        self.answer(200 if ok else 400, {'warnings': [], 'errors': [] if ok else [{'message': 'no license'}]})

    def preupload(self, repo, revision):
        if self.denied() or not (found := self.find(repo)):
            return
        held = found.head[1]
        self.answer(200, {'files': [
            {
                'path': item['path'], 'shouldIgnore': False,
                'uploadMode': 'lfs' if is_lfs(item['path']) else 'regular',
                'oid': content_oid(item['path'], held[item['path']]) if item['path'] in held else None,
            } for item in json.loads(self.body)['files']]})

    def lfs_batch(self, repo):
        if self.denied() or not self.find(repo):
            return
        objects = []
        for item in json.loads(self.body)['objects']:
            if item['oid'] not in self.server.objects:
                item['actions'] = {
                    'upload': {'href': f'{self.server.url}/storage/{item["oid"]}'},
                    'verify': {'href': f'{self.server.url}/verify/{item["oid"]}'},
                }
            objects.append(item)
        self.answer(200, {'transfer': 'basic', 'objects': objects}, {'Content-Type': 'application/vnd.git-lfs+json'})

    def store(self, oid):
        content = self.body
        if self.fault and self.fault.action == 'garble':
            content = content[:-1] + bytes([content[-1] ^ 1])
        if hashlib.sha256(content).hexdigest() != oid:
            self.answer(400, {'error': 'checksum mismatch'}, {'X-Error-Message': 'The SHA-256 checksum does not match'})
            return
        self.server.objects[oid] = content
        self.answer(200)

    def verify(self, oid):
        held = self.server.objects.get(oid)
        self.answer(200 if held is not None and len(held) == json.loads(self.body)['size'] else 404)

    def commit(self, repo, revision):
        if self.denied() or not (found := self.find(repo)):
            return
        files = dict(found.head[1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item['value']
            if item['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif item['key'] == 'lfsFile':
                if value['oid'] not in self.server.objects:
                    self.answer(400, {'error': f'LFS object {value["oid"]} is missing'})
                    return
                files[value['path']] = self.server.objects[value['oid']]
        oid = hashlib.sha1(self.body).hexdigest()
        found.commits.append((oid, files))
        self.answer(200, {
            'success': True, 'commitOid': oid, 'commitUrl': f'{self.server.url}/{repo}/commit/{oid}',
            'pullRequestUrl': None})

    def paths_info(self, repo, revision):
        if not (found := self.find(repo)):
            return
        files = found.head[1]
        known = [path for path in parse_qs(self.body.decode())['paths'] if path in files]
        self.answer(200, [self._path_info(path, files[path]) for path in known])

    def _path_info(self, path, content):
        if self.fault and self.fault.action == 'garble':
            content += b'?'
        info = {'type': 'file', 'path': path, 'size': len(content), 'oid': git_oid(content)}
        if is_lfs(path):
            info['lfs'] = {'oid': hashlib.sha256(content).hexdigest(), 'size': len(content), 'pointerSize': 130}
        return info

    def resolve(self, repo, revision, path):
        if not (found := self.find(repo)):
            return
        oid, files = found.head
        headers = {'X-Repo-Commit': oid}
        if revision not in ('main', oid):
            self.answer(404, b'', {**headers, 'X-Error-Code': 'RevisionNotFound'})
        elif path not in files:
            self.answer(404, b'', {**headers, 'X-Error-Code': 'EntryNotFound'})
        elif is_lfs(path):
            digest = hashlib.sha256(files[path]).hexdigest()
            self.answer(302, b'', {
                **headers, 'Location': f'{self.server.cdn_url}/{digest}', 'X-Linked-Etag': f'"{digest}"',
                'X-Linked-Size': str(len(files[path]))})
        else:
            self.content(files[path], {**headers, 'ETag': f'"{git_oid(files[path])}"'})

    def cdn(self, oid):
        content = self.server.objects[oid]
        if self.fault and self.fault.action == 'garble':
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.content(content, {'ETag': f'"{oid}"'})

    def content(self, content, headers):
        wanted = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range') or '')
        if wanted:
            start = int(wanted[1])
            headers = {**headers, 'Content-Range': f'bytes {start}-{len(content) - 1}/{len(content)}'}
            self.answer(206, content[start:], headers)
        else:
            self.answer(200, content, headers)


_REPO = r'(?P<repo>[^/]+/[^/]+)'
ROUTES = (
    ('/api/repos/create', ('POST',), Handler.create),
    ('/api/validate-yaml', ('POST',), Handler.validate),
    (f'/api/models/{_REPO}', ('GET',), Handler.info),
    (f'/api/models/{_REPO}/revision/(?P<revision>[^/]+)', ('GET',), Handler.info),
    (f'/api/models/{_REPO}/preupload/(?P<revision>[^/]+)', ('POST',), Handler.preupload),
    (f'/api/models/{_REPO}/commit/(?P<revision>[^/]+)', ('POST',), Handler.commit),
    (f'/api/models/{_REPO}/paths-info/(?P<revision>[^/]+)', ('POST',), Handler.paths_info),
    (rf'/{_REPO}\.git/info/lfs/objects/batch', ('POST',), Handler.lfs_batch),
    ('/storage/(?P<oid>[0-9a-f]{64})', ('PUT',), Handler.store),
    ('/verify/(?P<oid>[0-9a-f]{64})', ('POST',), Handler.verify),
    ('/cdn/(?P<oid>[0-9a-f]{64})', ('GET', 'HEAD'), Handler.cdn),
    (f'/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)', ('GET', 'HEAD'), Handler.resolve),
)
