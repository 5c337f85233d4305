{{/* Names and labels. */}}

{{- define "sd-service.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "sd-service.fullname" -}}
{{- $name := include "sd-service.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "sd-service.triton.fullname" -}}
{{- printf "%s-triton" (include "sd-service.fullname" .) -}}
{{- end -}}

{{- define "sd-service.serviceAccountName" -}}
{{- if .Values.serviceAccount.name -}}
{{- .Values.serviceAccount.name -}}
{{- else if .Values.serviceAccount.create -}}
{{- include "sd-service.fullname" . -}}
{{- else -}}
default
{{- end -}}
{{- end -}}

{{/* What never changes of a workload's pods. Arguments: root, component. */}}
{{- define "sd-service.selectorLabels" -}}
app.kubernetes.io/name: {{ include "sd-service.name" .root | quote }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component | quote }}
{{- end -}}

{{/* Labels of an object. Arguments: root, component. */}}
{{- define "sd-service.labels" -}}
{{- $own := include "sd-service.selectorLabels" . | fromYaml -}}
{{- $own = merge $own (dict
  "app.kubernetes.io/version" (.root.Chart.AppVersion | toString)
  "app.kubernetes.io/part-of" .root.Chart.Name
  "app.kubernetes.io/managed-by" .root.Release.Service
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_")
) -}}
{{- merge $own (deepCopy .root.Values.commonLabels) | toYaml -}}
{{- end -}}

{{/* Labels of pods: an update of the chart alone restarts none. Arguments: root, component, more. */}}
{{- define "sd-service.podLabels" -}}
{{- merge (include "sd-service.selectorLabels" . | fromYaml) (deepCopy .root.Values.commonLabels) (deepCopy .more) | toYaml -}}
{{- end -}}

{{/* A workload's image. Arguments: root, image, suffix. */}}
{{- define "sd-service.image" -}}
{{- $name := .image.repository -}}
{{- if .root.Values.images.registry -}}
{{- $name = printf "%s/%s" (.root.Values.images.registry | trimSuffix "/") $name -}}
{{- end -}}
{{- $tag := default (printf "%s%s" .root.Chart.AppVersion .suffix) .image.tag -}}
{{- if .image.digest -}}
{{- printf "%s:%s@%s" $name $tag .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name $tag -}}
{{- end -}}
{{- end -}}

{{- define "sd-service.server.image" -}}
{{- include "sd-service.image" (dict "root" . "image" .Values.server.image "suffix" (empty .Values.signing.existingSecret | ternary "" "-signing")) -}}
{{- end -}}

{{- define "sd-service.triton.image" -}}
{{- include "sd-service.image" (dict "root" . "image" .Values.triton.image "suffix" (printf "-%s" .Values.triton.device)) -}}
{{- end -}}

{{/* How many Tritons a server has at least. */}}
{{- define "sd-service.triton.least" -}}
{{- $triton := .Values.triton -}}
{{- if include "sd-service.triton.separate" . -}}
{{- eq $triton.autoscaling.kind "none" | ternary $triton.replicas $triton.autoscaling.minReplicas | int | max 1 -}}
{{- else -}}
1
{{- end -}}
{{- end -}}

{{/* "true" where Triton has workloads of its own; "true" where it is in the server's pods. */}}
{{- define "sd-service.triton.separate" -}}
{{- if and .Values.triton.enabled (eq .Values.triton.placement "separate") -}}true{{- end -}}
{{- end -}}
{{- define "sd-service.triton.sidecar" -}}
{{- if and .Values.triton.enabled (eq .Values.triton.placement "sidecar") -}}true{{- end -}}
{{- end -}}

{{- define "sd-service.tls.secret" -}}
{{- default (printf "%s-tls" (include "sd-service.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{- define "sd-service.claim" -}}
{{- default (printf "%s-engines" (include "sd-service.fullname" .)) .Values.engines.claim.existingClaim -}}
{{- end -}}
