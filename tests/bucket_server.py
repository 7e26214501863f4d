"""A server of buckets on the loopback, with the parts of the JSON API of Google Cloud Storage that
TensorStore, gcsfs and google-cloud-storage call: whole and partial reads, uploads, conditions on
generations, listings, moves and deletions. Objects are held in memory.
"""

import base64
import contextlib
import email
import http.server
import itertools
import json
import re
import threading
import urllib.parse

import google_crc32c

_BUCKET = '/storage/v1/b/([^/]+)'
ROUTES = {
    'upload': re.compile(f'/upload{_BUCKET}/o'),
    'bucket': re.compile(_BUCKET),
    'listing': re.compile(f'{_BUCKET}/o'),
    'move': re.compile(f'{_BUCKET}/o/([^/]+)/moveTo/o/([^/]+)'),
    'object': re.compile(f'(?:/download)?{_BUCKET}/o/([^/]+)'),
}


class Buckets(http.server.ThreadingHTTPServer):
    """The server, and what it holds.

    Args:
      port: 0 for a free one, which is `server_port` then.
      names: of the buckets.
    """

    def __init__(self, port, names):
        super().__init__(('127.0.0.1', port), Handler)
        self.objects = {name: {} for name in names}  # bucket -> name -> (generation, content)
        self.refused = {}  # bucket -> status of all answers
        self.reads = []  # (name, bytes) of each read of a content
        self.uploads = {}  # of uploads in parts: number -> name
        self.numbers, self.lock = itertools.count(1), threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def answer(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        with self.server.lock:
            status, content, headers = self.route(url.path, query, body)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        content = b'' if status in (204, 304) else content
        self.send_response(status)
        for name, value in {'Content-Type': 'application/json', **headers}.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # a client that has what it wants
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass

    def route(self, path, query, body):
        kind, match = next((k, m) for k, r in ROUTES.items() if (m := r.fullmatch(path)))
        place, *names = (urllib.parse.unquote(group) for group in match.groups())
        if place not in self.server.objects:
            return failure(404, f'the bucket {place!r} does not exist')
        if place in self.server.refused:
            return failure(self.server.refused[place], 'refused')
        bucket = self.server.objects[place]
        if kind == 'bucket':
            return 200, {'kind': 'storage#bucket', 'name': place, 'id': place}, {}
        if kind == 'listing':
            return 200, listing(bucket, query.get('prefix', ''), query.get('delimiter')), {}
        if kind == 'upload':
            return self.upload(bucket, query, body)
        (name, *target) = names
        if (refused := unmet(bucket, name, query)) or name not in bucket:
            return failure(refused or 404, name)
        if self.command == 'DELETE':
            del bucket[name]
            return 204, b'', {}
        if kind == 'move':
            bucket[target[0]] = next(self.server.numbers), bucket.pop(name)[1]
            return 200, metadata(bucket, target[0]), {}
        return self.content(bucket, name) if 'alt' in query else (200, metadata(bucket, name), {})

    def content(self, bucket, name):
        generation, content = bucket[name]
        headers = {'x-goog-generation': str(generation), 'Content-Type': 'application/octet-stream'}
        asked = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))
        first = int(asked[1]) if asked else 0
        part = content[first : int(asked[2]) + 1 if asked and asked[2] else None]
        self.server.reads.append((name, len(part)))
        if not asked or not part:
            return (416 if first else 200), part, headers
        headers['Content-Range'] = f'bytes {first}-{first + len(part) - 1}/{len(content)}'
        return 206, part, headers

    def upload(self, bucket, query, content):
        name = query.get('name')
        if query['uploadType'] == 'multipart':
            header = f'Content-Type: {self.headers["Content-Type"]}\n\n'.encode()
            about, data = email.message_from_bytes(header + content).get_payload()
            name, content = json.loads(about.get_payload())['name'], data.get_payload(decode=True)
        elif 'upload_id' in query:  # small ones have one part
            name = self.server.uploads.pop(query['upload_id'])
        elif query['uploadType'] == 'resumable':
            number = str(next(self.server.numbers))
            self.server.uploads[number] = name
            where = f'http://{self.headers["Host"]}{self.path}&upload_id={number}'
            return 200, {}, {'Location': where}
        if refused := unmet(bucket, name, query):
            return failure(refused, name)
        bucket[name] = next(self.server.numbers), bytes(content)
        return 200, metadata(bucket, name), {}


def failure(status, message):
    return status, {'error': {'code': status, 'message': message}}, {}


def unmet(bucket, name, query):
    """The status of a condition on the generation of an object that does not hold; 0: none."""
    generation = str(bucket[name][0] if name in bucket else 0)
    if query.get('ifGenerationMatch', generation) != generation:
        return 412
    return 304 if query.get('ifGenerationNotMatch') == generation else 0


def metadata(bucket, name):
    generation, content = bucket[name]
    checksum = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
    return {'name': name, 'size': len(content), 'generation': str(generation), 'crc32c': checksum}


def listing(bucket, prefix, delimiter):
    names = [name for name in sorted(bucket) if name.startswith(prefix)]
    inner = [name for name in names if delimiter and delimiter in name.removeprefix(prefix)]
    folders = {prefix + name.removeprefix(prefix).split(delimiter)[0] + delimiter for name in inner}
    items = [metadata(bucket, name) for name in names if name not in inner]
    return {'items': items, 'prefixes': sorted(folders)}
